"""mvc_jax: enlarge a small labelled image dataset by Mixing Visual Concepts."""

__version__ = "0.1.0"

"""A small Stable Diffusion of our own, where no base model is given."""

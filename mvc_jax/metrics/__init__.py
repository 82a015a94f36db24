"""How good classifiers and images are, and what limits the numbers."""

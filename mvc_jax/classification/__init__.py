"""Classifiers trained on real and synthetic images."""

"""Recipes to pixels to a dataset."""

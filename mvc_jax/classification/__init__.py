"""Classifiers: their runs, batches, training step and fits."""

"""Configs: one file a dataset, each a lab note. `common.py` has every field."""

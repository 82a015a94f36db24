"""Configs: one lab note per dataset; `common.py` has every field."""

"""Mixing visual concepts: the operations, and the recipes that say where."""

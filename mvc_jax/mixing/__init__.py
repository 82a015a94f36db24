"""Mixing visual concepts: the operations, and the recipes that they follow."""

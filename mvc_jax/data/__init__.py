"""Images and labels: sources, decoding, splits, captions, batch order. NumPy only."""

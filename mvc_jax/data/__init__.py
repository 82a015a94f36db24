"""Images, labels and captions in; stores and manifests on disk. Host NumPy only."""

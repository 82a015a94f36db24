"""Training loop, checkpoints, sharding, optimisers, logs; independent of the model."""

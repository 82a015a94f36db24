"""Training loop, checkpoints, sharding, optimisers, metrics: given a step, any step."""

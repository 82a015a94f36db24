"""What is around the stages: flags, the config of a run, its plan, price and folder."""

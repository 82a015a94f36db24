"""The small base, trained where no base model is given, and its companions."""

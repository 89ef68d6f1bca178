"""Floor 3: the one way to ask a model."""

"""How much memory a step of training or of inference takes, found by a step on tensors without values."""

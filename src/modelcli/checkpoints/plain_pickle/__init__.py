"""Pickles that `torch.save` did not write."""

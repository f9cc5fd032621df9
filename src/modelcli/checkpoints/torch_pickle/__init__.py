"""What `torch.save` writes: a zip archive or, before torch 1.6, pickles in a row; and pickles as inert values."""

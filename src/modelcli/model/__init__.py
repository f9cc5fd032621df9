"""A model as plain data, without torch: its blueprint, tensors, totals, dtypes and paths, and their JSON form."""

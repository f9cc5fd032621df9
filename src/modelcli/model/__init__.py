"""A model as plain data, without torch: blueprint, tensors, totals, dtypes, paths, and the JSON form."""

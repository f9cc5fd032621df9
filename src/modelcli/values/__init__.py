"""The values of tensors in files, with NumPy and without torch: read in pieces, converted, counted, compared."""

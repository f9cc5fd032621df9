"""Read, convert, count and compare the values of tensors in files, piece by piece, with NumPy and without torch."""

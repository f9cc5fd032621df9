"""How files that `torch.save` wrote are called. Imports nothing, so every module may ask."""

#: The suffixes of such files.
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar")

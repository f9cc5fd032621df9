"""Live models: `nn.Module`s on the meta device whose tensors know where their bytes come from.

The only package that imports torch.
"""

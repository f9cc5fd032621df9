"""The memory that kernels of a GPU take while they run, which no tensor shows.

Three kinds differ in how well they are known:

- cuBLAS keeps a workspace for each thread that multiplies matrices. PyTorch allocates it, and its size is known.
- Some kernels of PyTorch allocate temporary tensors whose sizes follow from their arguments.
- cuDNN says only at run time how much workspace the kernel that it has chosen for a convolution needs. What is assumed
  here is that it copies what it reads into another memory format, and the result into a third one.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import torch

_ATEN = torch.ops.aten

#: The operators that cuBLAS carries out.
MULTIPLICATIONS = frozenset(
    {
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN.baddbmm.default,
        _ATEN.addbmm.default,
        _ATEN.addmv.default,
        _ATEN.mv.default,
        _ATEN.dot.default,
    }
)

#: `getChosenWorkspaceSize` in `aten/src/ATen/cuda/CublasHandlePool.cpp`: on Hopper and Blackwell, and on older GPUs.
_CUBLAS_NEW, _CUBLAS_OLD = 4096 * 8 * 1024, 4096 * 1024 * 2 + 16 * 1024 * 8
_CONFIGURATION = "CUBLAS_WORKSPACE_CONFIG"


def of_cublas() -> int:
    """Return the bytes of one workspace of cuBLAS: on the GPU of this machine, else on a Hopper or Blackwell GPU.

    The environment variable `CUBLAS_WORKSPACE_CONFIG` (`:SIZE:COUNT`, in KiB, again for more) overrides it.
    """
    stated = re.findall(r":(\d+):(\d+)", os.environ.get(_CONFIGURATION, ""))
    if stated:
        return sum(int(size) * 1024 * int(count) for size, count in stated)
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9
    return _CUBLAS_OLD if is_old else _CUBLAS_NEW


def of_convolution(func: Any, args: Any, out: Any) -> int | None:
    """Return the bytes that cuDNN may need for a convolution; None for another operator."""
    if func is _ATEN.convolution.default:
        read, weight = args[0], args[1]
        return None if _is_depthwise(read, args[8]) else _nbytes(read) + _nbytes(weight) + _nbytes(out)
    if func is _ATEN.convolution_backward.default:
        gradient, read, weight = args[:3]
        if _is_depthwise(read, args[9]):
            return None
        return _nbytes(gradient) + max(_nbytes(read), _nbytes(out[0])) + _nbytes(weight)
    return None


def _is_depthwise(read: torch.Tensor, groups: int) -> bool:
    """Whether a convolution is depthwise: PyTorch has kernels of its own for these."""
    return groups > 1 and groups == read.shape[1]


def _nbytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def hidden(func: Any, args: Any) -> int | None:
    """Return the bytes that a kernel of PyTorch allocates while it runs; None for an operator without such a kernel."""
    if func is _FLASH_BACKWARD:
        # `mha_bwd` of FlashAttention 2: `dq_accum` and `softmax_d`, in float32, for sequences rounded to 128.
        query, key = args[1], args[2]
        batch, heads, length, head_size = query.shape
        rows = batch * heads * -(-length // 128) * 128
        rounded = -(-head_size // 32) * 32 if head_size <= 128 else -(-head_size // 64) * 64
        nbytes: int = 4 * rows * (rounded + 1)
        if key.shape[1] != heads:  # the gradients of keys and values, expanded to the heads of the query
            nbytes += 2 * math.prod((batch, heads, key.shape[2], head_size)) * key.element_size()
        return nbytes
    return None


_FLASH_BACKWARD: Any = _ATEN._scaled_dot_product_flash_attention_backward.default

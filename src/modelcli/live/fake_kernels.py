"""Support, in passes under fake tensors, for operators that the CPU runs and torch's fake kernels refuse."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: The operator of `torch.nn.functional.grouped_mm`, or None in a torch that is too old to have it.
_GROUPED_MM: Any = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


class MissingKernels(TorchDispatchMode):
    """Makes `grouped_mm` accept float32, as on the CPU. transformers uses it to run the experts of a model.

    The fake kernel accepts bfloat16 or float16 only; the output has the same shape.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; `grouped_mm` of float32 runs in bfloat16."""
        if func is not _GROUPED_MM or args[0].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        given = [arg.to(torch.bfloat16) if _is_float32(arg) else arg for arg in args]
        named = {key: arg.to(torch.bfloat16) if _is_float32(arg) else arg for key, arg in (kwargs or {}).items()}
        return func(*given, **named).to(torch.float32)


def _is_float32(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    """Stop torch from logging a traceback for each operator that fails under fake tensors; the pass reports it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)

"""How much memory a step of a model takes, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelcli.model.memory_log import Kind, ModuleMemory, Moment


@dataclass(frozen=True)
class Margin:
    """What a step may take beyond the peak, and what nobody knows before it runs, in bytes.

    Attributes:
        workspaces: by how much the workspaces of cuDNN may raise the peak.
        fragmentation: what the allocator keeps reserved beyond the peak.
        context: the CUDA context and the kernels that are loaded.
    """

    workspaces: int = 0
    fragmentation: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        return self.workspaces + self.fragmentation + self.context


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one step.

    Attributes:
        batch: the batch size; None if the inputs have no batch dimension in common.
        inputs: the shapes of the input tensors.
        whole: the bytes of each kind when there was most of it; `temporary` is that of the peak.
        peak: the moment at which most was allocated.
        cublas: the bytes of the workspaces of cuBLAS, which are part of `temporary`.
        margin: what may come on top.
        modules: what each module has to do with it.
        loss: what the loss was; None for inference.
        cache_bytes: the bytes of the keys and values that a language model keeps; None for another model.
        notes: what the user should know.
    """

    batch: int | None
    inputs: tuple[tuple[int, ...], ...]
    whole: Mapping[Kind, int]
    peak: Moment
    cublas: int
    margin: Margin
    modules: tuple[ModuleMemory, ...]
    loss: str | None = None
    cache_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The peak and the margin."""
        return self.peak.allocated + self.margin.total

    @property
    def fixed(self) -> int:
        """What no batch size changes: parameters, buffers, gradients, the optimizer's state, and the CUDA context."""
        return sum(self.whole[kind] for kind in ("params", "buffers", "gradients", "optimizer")) + self.margin.context

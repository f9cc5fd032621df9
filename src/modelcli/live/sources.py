"""Where a live model's bytes come from. The tag is on the storage: views and `Parameter`s of it share it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from modelcli.checkpoints import Storage
from modelcli.checkpoints.contents import Windows
from modelcli.checkpoints.limits import Budget
from modelcli.errors import ModelcliError, RequestError

CHUNK = 8 * 1024 * 1024
#: What a number counts as that is made a Python object and written, and one that torch works off: see `budget_of`.
NUMBER, COUNTED = 16, 4


class Value:
    """Bytes that are in memory already: the storage of a real tensor."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes()

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, in pieces of at most 8 MiB, without a copy."""
        nbytes = self.nbytes
        if not nbytes:
            return
        view = memoryview((ctypes.c_char * nbytes).from_address(self.storage.data_ptr())).cast("B")
        for start in range(0, nbytes, CHUNK):
            yield view[start : start + CHUNK]

    def real(self) -> torch.UntypedStorage:
        return self.storage


class Drawn:
    """Bytes that a real build will draw: made on first use, all of one build together."""

    def __init__(self, build: Lazy, name: str, nbytes: int) -> None:
        self.build = build
        self.name = name
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def chunks(self) -> Iterator[memoryview]:
        return Value(self.real()).chunks()

    def real(self) -> torch.UntypedStorage:
        storage = self.build.tensor(self.name).untyped_storage()
        if storage.device.type == "meta":
            raise RequestError(f"{self.name} has no numbers: its constructor makes it on the meta device")
        if storage.nbytes() != self._nbytes:
            raise ModelcliError(
                f"{self.name} was built with {storage.nbytes():,} bytes, and its twin without weights says "
                f"{self._nbytes:,}: the constructor makes another model each time"
            )
        return storage


class Lazy:
    """A real module that is built when the first of its tensors is asked for."""

    def __init__(self, build: Callable[[], torch.nn.Module]) -> None:
        self._build = build
        self._tensors: dict[str, torch.Tensor] | None = None

    def tensor(self, name: str) -> torch.Tensor:
        if self._tensors is None:
            self._tensors = named_tensors(self._build())
        if name not in self._tensors:
            raise ModelcliError(f"the constructor made no {name} this time: it makes another model each time")
        return self._tensors[name]


class Computed:
    """Bytes that are computed when they are asked for, each time anew: nothing is kept.

    `compute` gives a contiguous tensor that is all of its storage: these bytes. `cut` gives so many bytes from a start
    on as a source of their own, where a part can be computed without the rest.
    """

    def __init__(
        self,
        nbytes: int,
        compute: Callable[[], torch.Tensor],
        cut: Callable[[int, int], Computed] | None = None,
    ) -> None:
        self._nbytes = nbytes
        self._compute = compute
        self._cut = cut

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in pieces of at most 8 MiB; computed one at a time where that can be."""
        step = CHUNK if self._cut is not None else max(self._nbytes, 1)
        for start in range(0, self._nbytes, step):
            part = self.part(start, min(step, self._nbytes - start))
            for piece in Value(part.real()).chunks():
                yield bytes(piece)  # a copy, which outlives the storage

    def real(self) -> torch.UntypedStorage:
        return self._compute().untyped_storage()

    def part(self, start: int, nbytes: int) -> Computed:
        """`nbytes` of the bytes, from `start`, both on the border of an element."""
        if (start, nbytes) == (0, self._nbytes):
            return self
        if self._cut is not None:
            return self._cut(start, nbytes)
        return Computed(nbytes, lambda: self._compute().flatten().view(torch.uint8)[start : start + nbytes].clone())


def converted(flat: torch.Tensor, dtype: torch.dtype) -> Computed:
    """The elements of a tensor of one dimension as another dtype: what `flat.to(dtype)` gives, a piece at a time."""
    size = dtype.itemsize

    def cut(start: int, nbytes: int) -> Computed:
        return converted(flat[start // size : (start + nbytes) // size], dtype)

    return Computed(flat.numel() * size, lambda: real_tensor(flat).to(dtype), cut)


AnySource = Value | Drawn | Computed | Storage


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, under every name it has."""
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found.update(module.named_buffers(remove_duplicate=False))
    return found


def tag(tensor: torch.Tensor, source: AnySource) -> None:
    """Say where the bytes of a meta tensor's storage come from."""
    tensor.untyped_storage().source = source  # type: ignore[attr-defined]


def source_of(tensor: torch.Tensor) -> AnySource | None:
    """Where a tensor's bytes come from; None for a meta tensor that nothing says it of."""
    storage = tensor.untyped_storage()
    source: AnySource | None = getattr(storage, "source", None)
    if source is None and not tensor.is_meta:
        return Value(storage)
    return source


def tag_drawn(module: torch.nn.Module, build: Lazy) -> None:
    """Let every tensor of a meta module that has no source yet come from a real build of it, by name."""
    for name, tensor in named_tensors(module).items():
        if not is_lazy(tensor) and tensor.is_meta and source_of(tensor) is None:
            tag(tensor, Drawn(build, name, tensor.untyped_storage().nbytes()))


def budget_of(tensors: Iterable[torch.Tensor], what: str) -> Budget:
    """What may be made of the numbers of tensors: views can have far more elements than there are bytes in a file.

    A number that is shown counts as `NUMBER`, one of statistics as `COUNTED`.
    """
    nbytes = {storage._cdata: storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}
    return Budget(what, sum(nbytes.values()), times=NUMBER)


def near_windows() -> Windows:
    """Windows for tensors that are looked at one after another: to map each of 100,000 small ones takes far longer.

    What they hold stays small: the one that a tensor lies in, and no large tensors.
    """
    return Windows(1 << 26, longest=1 << 16, most=1)


def is_lazy(tensor: Any) -> bool:
    """Whether a tensor has no shape yet, as those of `LazyLinear` before the first forward pass."""
    return bool(torch.nn.parameter.is_lazy(tensor))


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name without `torch.`. Raises RequestError for one that this version of torch does not have."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise RequestError(f"torch {torch.__version__} has no dtype {name}", "a newer torch may")
    return found


def is_composite(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no plain view into one storage: quantized, or sparse."""
    return tensor.is_quantized or tensor.layout != torch.strided


def real_storage(source: AnySource, windows: Windows | None = None) -> torch.UntypedStorage:
    """The bytes of a source as a real storage; those of one span of a file are mapped, not read."""
    if isinstance(source, Value | Drawn | Computed):
        return source.real()
    view = source.mapped(windows)
    if not view.nbytes:
        return torch.UntypedStorage(0)
    return torch.frombuffer(view, dtype=torch.uint8).untyped_storage()


def extent(tensor: torch.Tensor) -> int:
    """Elements of the storage from the first to the last that a tensor views, both included; 0 for an empty one."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def real_tensor(tensor: torch.Tensor, windows: Windows | None = None) -> torch.Tensor:
    """A real tensor with the bytes of a live model's meta tensor, its shape and stride.

    Of a file, the bytes from the tensor's first element to its last are mapped, and not the rest of the storage; with
    `windows` they are a part of one of those.
    """
    if not tensor.is_meta:
        return tensor.detach()
    source = source_of(tensor)
    if source is None:
        raise ModelcliError(f"a tensor of shape {list(tensor.shape)} has no numbers: nothing says where they come from")
    offset = int(tensor.storage_offset())
    if not isinstance(source, Value | Drawn):
        size = tensor.element_size()
        source, offset = source.part(offset * size, extent(tensor) * size), 0
    made = torch.empty(0, dtype=tensor.dtype)
    return made.set_(real_storage(source, windows), offset, tensor.size(), tensor.stride())

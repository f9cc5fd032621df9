"""The sources of a live model's bytes. The storage carries the source, so that views and `Parameter`s share it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from modelcli.checkpoints import Span, Storage
from modelcli.checkpoints.storage import MAX_READ, FileId, Windows
from modelcli.errors import ModelcliError, RequestError
from modelcli.values import conversion
from modelcli.values.conversion import Conversion

CHUNK = 8 * 1024 * 1024
#: The bytes of a file to map, and of the result to make, at a time when collecting elements that are far apart in the
#: file. A larger window needs more memory; a smaller one reads pages more often.
WINDOW = 64 * 1024 * 1024


#: Builds happen one at a time, so that the random values do not depend on which thread needs them first.
_ONE_AT_A_TIME = threading.RLock()


class Value:
    """Bytes in memory: the storage of a real tensor. `files` are the files that it maps."""

    def __init__(self, storage: torch.UntypedStorage, files: Iterable[FileId] = ()) -> None:
        self.storage = storage
        self._files = files

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes()

    def files(self) -> Iterable[FileId]:
        return self._files

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces of at most 8 MiB, without copying."""
        view = self.view()
        for start in range(0, self.nbytes, CHUNK):
            yield view[start : start + CHUNK]

    def view(self) -> memoryview:
        """Return the bytes without copying."""
        if not self.nbytes:
            return memoryview(b"")
        memory = (ctypes.c_char * self.nbytes).from_address(self.storage.data_ptr())
        memory.storage = self.storage  # type: ignore[attr-defined]  # keeps the storage alive with the view
        return memoryview(memory).cast("B")

    def bytes(self) -> bytes:
        return bytes(self.view())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Return the same memory; writing to it changes the tensor."""
        return self.view()

    def real(self) -> torch.UntypedStorage:
        return self.storage

    def part(self, start: int, nbytes: int) -> Value:
        """Return `nbytes` of the bytes, from `start` on, in the same memory."""
        if (start, nbytes) == (0, self.nbytes):
            return self
        return Value(self.storage[start : start + nbytes], self._files)


class Drawn:
    """Bytes of random values that a real build will draw. The first use builds all tensors of one build."""

    def __init__(self, build: Lazy, name: str, nbytes: int) -> None:
        self.build = build
        self.name = name
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def files(self) -> Iterable[FileId]:
        return ()

    def chunks(self) -> Iterator[memoryview]:
        return Value(self.real()).chunks()

    def real(self) -> torch.UntypedStorage:
        storage = self.build.tensor(self.name).untyped_storage()
        if storage.device.type == "meta":
            raise RequestError(f"{self.name} has no values: its constructor makes it on the meta device")
        if storage.nbytes() != self._nbytes:
            raise ModelcliError(
                f"{self.name} was built with {storage.nbytes():,} bytes, but on the meta device with "
                f"{self._nbytes:,}: the constructor makes a different model each time"
            )
        return storage

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Return the bytes in the memory of the build."""
        with _ONE_AT_A_TIME:
            return Value(self.real()).view()

    def part(self, start: int, nbytes: int) -> Drawn | Computed:
        """Return `nbytes` of the bytes, from `start` on; the build happens when they are needed."""
        if (start, nbytes) == (0, self._nbytes):
            return self
        whole = Computed(self._nbytes, lambda first, count: Value(self.real()).part(first, count).real(), (self,))
        return whole.part(start, nbytes)


class Lazy:
    """A real module that is built when the first of its tensors is needed."""

    def __init__(self, build: Callable[[], torch.nn.Module]) -> None:
        self._build = build
        self._tensors: dict[str, torch.Tensor] | None = None

    def tensor(self, name: str) -> torch.Tensor:
        if self._tensors is None:
            self._tensors = named_tensors(self._build())
        if name not in self._tensors:
            raise ModelcliError(f"the constructor made no {name} this time: it makes a different model each time")
        # A storage does not carry torch's conjugation and negation bits, so the values must be resolved.
        return self._tensors[name].detach().resolve_conj().resolve_neg()


@dataclass(frozen=True, slots=True)
class Computed:
    """Bytes that are computed anew each time they are needed; nothing is kept.

    Attributes:
        nbytes: the number of bytes.
        compute: a function (start, nbytes) that returns bytes as a storage; both arguments are multiples of the
            element size.
        reads: the sources that `compute` reads.
        step: the number of bytes to compute at a time.
        start: the first byte of this part, for `compute`.
    """

    nbytes: int
    compute: Callable[[int, int], torch.UntypedStorage]
    reads: tuple[AnySource, ...] = ()
    step: int = field(default_factory=lambda: CHUNK)
    start: int = 0

    def files(self) -> Iterable[FileId]:
        return {file for source in self.reads for file in source.files()}

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in pieces of at most 8 MiB."""
        for start in range(0, self.nbytes, self.step):
            part = self.part(start, min(self.step, self.nbytes - start))
            for piece in Value(part.real()).chunks():
                yield bytes(piece)  # a copy, because the storage is freed

    def real(self) -> torch.UntypedStorage:
        return self.compute(self.start, self.nbytes)

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Compute all the bytes, and return them in new memory."""
        with _ONE_AT_A_TIME:
            return Value(self.real()).view()

    def part(self, start: int, nbytes: int) -> Computed:
        """Return `nbytes` of the bytes, from `start` on; both must be multiples of the element size."""
        return replace(self, nbytes=nbytes, start=self.start + start)


def converted(flat: torch.Tensor, dtype: torch.dtype) -> Conversion:
    """The elements of a whole storage, as `flat` shows it, as another dtype; nothing is converted yet."""
    before, after = (str(kind).removeprefix("torch.") for kind in (flat.dtype, dtype))
    return conversion.converted(require_source(flat), before, after)


def row_major(tensor: torch.Tensor) -> AnySource:
    """Return the bytes of a contiguous copy of a tensor, which are read only when they are needed.

    Raises ModelcliError if the tensor has no source.
    """
    source, size = require_source(tensor), tensor.element_size()
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        return source.part(int(tensor.storage_offset()) * size, tensor.numel() * size)
    view = tensor.detach()

    def compute(start: int, nbytes: int) -> torch.UntypedStorage:
        made, done = torch.empty(nbytes // size, dtype=view.dtype), 0
        for part in _run(view, start // size, (start + nbytes) // size):
            copy_into(made[done : done + part.numel()].view(part.shape), part)
            done += part.numel()
        return made.untyped_storage()

    return Computed(view.numel() * size, compute, (source,), step=WINDOW)


def _run(view: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
    """Return elements `start` to `stop` of a tensor in row-major order, as views of it, in whole rows if possible."""
    if (start, stop) == (0, view.numel()):
        return [view]
    row = view[0].numel()
    first, last = -(-start // row), stop // row
    if first > last:  # both are in one row
        return _run(view[last], start - last * row, stop - last * row)
    head = _run(view[first - 1], start - (first - 1) * row, row) if start < first * row else []
    tail = _run(view[last], 0, stop - last * row) if last * row < stop else []
    return [*head, *([view[first:last]] if first < last else []), *tail]


def copy_into(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy the values of a live model's tensor into a real tensor of the same shape, converted to its dtype.

    At most `WINDOW` bytes of a file are mapped at a time; a tensor that extends further is copied in halves.
    """
    if extent(tensor) * tensor.element_size() <= WINDOW or not tensor.is_meta:
        target.copy_(real_tensor(tensor))
        return
    for half in halves(tensor):
        copy_into(target[half], tensor[half])


def halves(tensor: torch.Tensor) -> list[tuple[slice, ...]]:
    """Return the indices of two halves of a tensor, split along the axis that extends furthest in memory."""
    reach = [((size - 1) * step, size) for size, step in zip(tensor.size(), tensor.stride(), strict=True)]
    widest = reach.index(max(reach))
    whole, middle = (slice(None),) * widest, tensor.size(widest) // 2
    return [(*whole, slice(middle)), (*whole, slice(middle, None))]


AnySource = Value | Drawn | Computed | Storage


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer under each of its names."""
    kind = torch.nn.Module  # the model's class may override these methods
    found: dict[str, torch.Tensor] = dict(kind.named_parameters(module, remove_duplicate=False))
    found.update(kind.named_buffers(module, remove_duplicate=False))
    return found


def tag(tensor: torch.Tensor, source: AnySource) -> None:
    """Set the source of the bytes of a meta tensor's storage."""
    tensor.untyped_storage().source = source  # type: ignore[attr-defined]


def source_of(tensor: torch.Tensor) -> AnySource | None:
    """Return the source of a tensor's bytes; None for a meta tensor without one."""
    if hasattr(tensor, "__tensor_flatten__"):
        return None  # a tensor subclass that keeps its values in attributes
    storage = tensor.untyped_storage()
    source: AnySource | None = getattr(storage, "source", None)
    if source is None and not tensor.is_meta:
        return Value(storage, getattr(storage, "mapped_files", ()))
    return source


def require_source(tensor: torch.Tensor) -> AnySource:
    """Return the source of a tensor's bytes. Raises ModelcliError for a meta tensor without one."""
    source = source_of(tensor)
    if source is None:
        raise ModelcliError(
            f"a tensor of shape {list(tensor.shape)} has no values: modelcli does not know their source"
        )
    return source


def computed_tensor(
    shape: Sequence[int], dtype: torch.dtype, compute: Callable[[], torch.Tensor], reads: Iterable[AnySource]
) -> torch.Tensor:
    """Return a tensor on the meta device whose values are computed as a whole, each time that they are needed.

    Args:
        shape: its shape.
        dtype: its dtype.
        compute: returns the contiguous values, of this shape and dtype.
        reads: the sources that `compute` reads.
    """
    made = torch.empty(tuple(shape), dtype=dtype, device="meta")

    def part(start: int, nbytes: int) -> torch.UntypedStorage:
        return Value(compute().untyped_storage()).part(start, nbytes).real()

    tag(made, Computed(made.nbytes, part, tuple(reads), step=max(made.nbytes, 1)))
    return made


def tag_drawn(module: torch.nn.Module, build: Lazy) -> None:
    """Make a real build the source, by name, of every tensor of a meta module that has no source yet."""
    for name, tensor in named_tensors(module).items():
        if not is_lazy(tensor) and tensor.is_meta and not is_composite(tensor) and source_of(tensor) is None:
            tag(tensor, Drawn(build, name, tensor.untyped_storage().nbytes()))


#: The attribute of a parameter whose `requires_grad` is not known; torch has no third value for that.
_UNKNOWN = "_modelcli_flag_unknown"
#: The attribute of a parameter whose `requires_grad` an edit has set, even to what it was.
_STATED = "_modelcli_flag_stated"


def set_flag(parameter: torch.Tensor, trained: bool | None) -> None:
    """Set `requires_grad`. None means that it is not known; torch's flag is then True."""
    if parameter.dtype.is_floating_point or parameter.dtype.is_complex:
        parameter.requires_grad = trained is not False  # `requires_grad_` fails for a parameter without a shape
    vars(parameter).pop(_UNKNOWN, None)
    if trained is None:
        setattr(parameter, _UNKNOWN, True)


def state_flag(parameter: torch.Tensor, trained: bool) -> None:
    """Set `requires_grad` as an edit states it. Of a parameter on the meta device, that is remembered."""
    set_flag(parameter, trained)
    if parameter.is_meta:
        setattr(parameter, _STATED, trained)


def stated_flag(parameter: torch.Tensor) -> bool | None:
    """Return the `requires_grad` that the last edit of it stated; None if no edit did."""
    stated: bool | None = getattr(parameter, _STATED, None)
    return stated


def flag_of(parameter: torch.Tensor) -> bool | None:
    """Return `requires_grad`, or None if it is not known."""
    return None if hasattr(parameter, _UNKNOWN) else parameter.requires_grad


def is_lazy(tensor: Any) -> bool:
    """Whether a tensor has no shape yet, like those of `LazyLinear` before the first forward pass."""
    return bool(torch.nn.parameter.is_lazy(tensor))


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype with this name (without `torch.`). Raises RequestError if this torch version lacks it."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise RequestError(f"torch {torch.__version__} has no dtype {name}", "a newer torch may have it")
    return found


def is_composite(tensor: torch.Tensor) -> bool:
    """Whether a tensor is quantized or sparse, and so not a plain view of one storage."""
    return tensor.is_quantized or tensor.layout != torch.strided


def real_storage(source: AnySource, windows: Windows | None = None) -> torch.UntypedStorage:
    """Return the bytes of a source as a real storage that no other tensor shares.

    Without `windows` they are read now. With `windows` they are mapped, and read when they are used.
    """
    if isinstance(source, Value | Drawn | Computed):
        return source.real()
    if isinstance(source, Span) and windows is None and source.nbytes <= MAX_READ:
        read = torch.UntypedStorage(source.nbytes)  # unlike a bytearray, it is not filled with zeros first
        if source.nbytes:
            source.read_into(Value(read).view())
        read.mapped_files = source.files()  # type: ignore[attr-defined]
        return read
    view = source.mapped(windows)
    if not view.nbytes:
        return torch.UntypedStorage(0)
    made = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
    made.mapped_files = source.files()  # type: ignore[attr-defined]  # parts of them are still unread
    return made


def extent(tensor: torch.Tensor) -> int:
    """Return the number of storage elements from the first to the last that a tensor uses; 0 if it is empty."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def real_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A real tensor with the bytes of a live model's meta tensor, its shape and stride.

    Of a file, the bytes from the tensor's first element to its last are read, and not the rest of the storage.
    """
    if not tensor.is_meta:
        return tensor.detach()
    source = require_source(tensor)
    made, size = torch.empty(0, dtype=tensor.dtype), tensor.element_size()
    part = source.part(int(tensor.storage_offset()) * size, extent(tensor) * size)
    return made.set_(real_storage(part), 0, tensor.size(), tensor.stride())

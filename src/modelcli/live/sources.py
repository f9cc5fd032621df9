"""Where a live model's bytes come from. The tag is on the storage: views and `Parameter`s of it share it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from modelcli.checkpoints import Span, Storage
from modelcli.checkpoints.storage import MOST_READ, FileId, Windows
from modelcli.errors import ModelcliError, RequestError
from modelcli.values import conversion
from modelcli.values.conversion import Conversion

CHUNK = 8 * 1024 * 1024
#: So much of a file is mapped at a time, and so much is made at a time, where elements that lie far apart in it are
#: brought together: more takes more memory, less reads its pages more often.
WINDOW = 64 * 1024 * 1024


#: A model is built once, and torch's random numbers come in one order, whichever threads ask for values.
_ONE_AT_A_TIME = threading.RLock()


class Value:
    """Bytes that are in memory already: the storage of a real tensor. `files` are those that it is a mapping of."""

    def __init__(self, storage: torch.UntypedStorage, files: Iterable[FileId] = ()) -> None:
        self.storage = storage
        self._files = files

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes()

    def files(self) -> Iterable[FileId]:
        return self._files

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, in pieces of at most 8 MiB, without a copy."""
        view = self.view()
        for start in range(0, self.nbytes, CHUNK):
            yield view[start : start + CHUNK]

    def view(self) -> memoryview:
        """The bytes, without a copy."""
        if not self.nbytes:
            return memoryview(b"")
        memory = (ctypes.c_char * self.nbytes).from_address(self.storage.data_ptr())
        memory.storage = self.storage  # type: ignore[attr-defined]  # which lives as long as the view of it
        return memoryview(memory).cast("B")

    def bytes(self) -> bytes:
        return bytes(self.view())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """The same memory: what is written to it is written to the tensor."""
        return self.view()

    def real(self) -> torch.UntypedStorage:
        return self.storage

    def part(self, start: int, nbytes: int) -> Value:
        """`nbytes` of the bytes, from `start`: the same memory."""
        if (start, nbytes) == (0, self.nbytes):
            return self
        return Value(self.storage[start : start + nbytes], self._files)


class Drawn:
    """Bytes that a real build will draw: made on first use, all of one build together."""

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
            raise RequestError(f"{self.name} has no numbers: its constructor makes it on the meta device")
        if storage.nbytes() != self._nbytes:
            raise ModelcliError(
                f"{self.name} was built with {storage.nbytes():,} bytes, and its twin without weights says "
                f"{self._nbytes:,}: the constructor makes another model each time"
            )
        return storage

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """The bytes as the build drew them, in its memory."""
        with _ONE_AT_A_TIME:
            return Value(self.real()).view()

    def part(self, start: int, nbytes: int) -> Drawn | Computed:
        """`nbytes` of the bytes, from `start`: of the memory that the build takes, when it is there."""
        if (start, nbytes) == (0, self._nbytes):
            return self
        whole = Computed(self._nbytes, lambda first, count: Value(self.real()).part(first, count).real(), (self,))
        return whole.part(start, nbytes)


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
        # A mark that the bytes are conjugated or negated when they are read is lost with them.
        return self._tensors[name].detach().resolve_conj().resolve_neg()


@dataclass(frozen=True, slots=True)
class Computed:
    """Bytes that are computed when they are asked for, each time anew: nothing is kept.

    `compute(start, nbytes)` gives so many of them from a start on, both on the border of an element, as a storage.
    `reads` are the sources that it takes its numbers from. `step` is how many bytes are computed at a time. These are
    the `nbytes` from `start` of what it can give.
    """

    nbytes: int
    compute: Callable[[int, int], torch.UntypedStorage]
    reads: tuple[AnySource, ...] = ()
    step: int = field(default_factory=lambda: CHUNK)
    start: int = 0

    def files(self) -> Iterable[FileId]:
        return {file for source in self.reads for file in source.files()}

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in pieces of at most 8 MiB."""
        for start in range(0, self.nbytes, self.step):
            part = self.part(start, min(self.step, self.nbytes - start))
            for piece in Value(part.real()).chunks():
                yield bytes(piece)  # a copy, which outlives the storage

    def real(self) -> torch.UntypedStorage:
        return self.compute(self.start, self.nbytes)

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """The bytes, all of them computed, in memory of their own."""
        with _ONE_AT_A_TIME:
            return Value(self.real()).view()

    def part(self, start: int, nbytes: int) -> Computed:
        """`nbytes` of the bytes, from `start`, both on the border of an element."""
        return replace(self, nbytes=nbytes, start=self.start + start)


def converted(flat: torch.Tensor, dtype: torch.dtype) -> Conversion:
    """The elements of a whole storage, as `flat` shows it, as another dtype; nothing is converted yet."""
    before, after = (str(kind).removeprefix("torch.") for kind in (flat.dtype, dtype))
    return conversion.converted(require_source(flat), before, after)


def row_major(tensor: torch.Tensor) -> AnySource:
    """The elements of a tensor one after another, as a contiguous copy of it has them; nothing is read yet.

    Raises ModelcliError where nothing says where its numbers come from.
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
    """The elements of a tensor from one to another in row-major order, as views of it: whole rows as far as can be."""
    if (start, stop) == (0, view.numel()):
        return [view]
    row = view[0].numel()
    first, last = -(-start // row), stop // row
    if first > last:  # both lie in one row
        return _run(view[last], start - last * row, stop - last * row)
    head = _run(view[first - 1], start - (first - 1) * row, row) if start < first * row else []
    tail = _run(view[last], 0, stop - last * row) if last * row < stop else []
    return [*head, *([view[first:last]] if first < last else []), *tail]


def copy_into(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy the numbers of a live model's tensor into a real one of its shape, whose dtype they take.

    Of a file no more than `WINDOW` bytes are mapped at a time: what lies far apart is copied in halves.
    """
    if extent(tensor) * tensor.element_size() <= WINDOW or not tensor.is_meta:
        target.copy_(real_tensor(tensor))
        return
    for half in halves(tensor):
        copy_into(target[half], tensor[half])


def halves(tensor: torch.Tensor) -> list[tuple[slice, ...]]:
    """The indices of the two halves of a tensor of several elements, cut where they lie furthest apart."""
    reach = [((size - 1) * step, size) for size, step in zip(tensor.size(), tensor.stride(), strict=True)]
    widest = reach.index(max(reach))
    whole, middle = (slice(None),) * widest, tensor.size(widest) // 2
    return [(*whole, slice(middle)), (*whole, slice(middle, None))]


AnySource = Value | Drawn | Computed | Storage


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, under every name it has."""
    kind = torch.nn.Module  # a class may have an attribute, or a method of its own, of one of these names
    found: dict[str, torch.Tensor] = dict(kind.named_parameters(module, remove_duplicate=False))
    found.update(kind.named_buffers(module, remove_duplicate=False))
    return found


def tag(tensor: torch.Tensor, source: AnySource) -> None:
    """Say where the bytes of a meta tensor's storage come from."""
    tensor.untyped_storage().source = source  # type: ignore[attr-defined]


def source_of(tensor: torch.Tensor) -> AnySource | None:
    """Where a tensor's bytes come from; None for a meta tensor that nothing says it of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return None  # of a class of its own, whose values are in its attributes
    storage = tensor.untyped_storage()
    source: AnySource | None = getattr(storage, "source", None)
    if source is None and not tensor.is_meta:
        return Value(storage, getattr(storage, "mapped_files", ()))
    return source


def require_source(tensor: torch.Tensor) -> AnySource:
    """Where a tensor's bytes come from. Raises ModelcliError for a meta tensor that nothing says it of."""
    source = source_of(tensor)
    if source is None:
        raise ModelcliError(f"a tensor of shape {list(tensor.shape)} has no numbers: nothing says where they come from")
    return source


def tag_drawn(module: torch.nn.Module, build: Lazy) -> None:
    """Let every tensor of a meta module that has no source yet come from a real build of it, by name."""
    for name, tensor in named_tensors(module).items():
        if not is_lazy(tensor) and tensor.is_meta and not is_composite(tensor) and source_of(tensor) is None:
            tag(tensor, Drawn(build, name, tensor.untyped_storage().nbytes()))


#: Set on a parameter of which nothing says whether it is trained: torch itself has no third value for that.
_UNKNOWN = "_modelcli_flag_unknown"


def set_flag(parameter: torch.Tensor, trained: bool | None) -> None:
    """Set `requires_grad`; None where nothing says it, and then it is as torch makes a parameter."""
    if parameter.dtype.is_floating_point or parameter.dtype.is_complex:
        parameter.requires_grad = trained is not False  # the method is not for parameters without a shape
    vars(parameter).pop(_UNKNOWN, None)
    if trained is None:
        setattr(parameter, _UNKNOWN, True)


def flag_of(parameter: torch.Tensor) -> bool | None:
    """`requires_grad`, or None where nothing says it."""
    return None if hasattr(parameter, _UNKNOWN) else parameter.requires_grad


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
    """The bytes of a source as a real storage, which no other one shares.

    They are read; those of a whole load, whose `windows` are mappings, are read when they are used.
    """
    if isinstance(source, Value | Drawn | Computed):
        return source.real()
    if isinstance(source, Span) and windows is None and source.nbytes <= MOST_READ:
        read = torch.UntypedStorage(source.nbytes)  # which is not filled with zeros first, as Python's memory is
        if source.nbytes:
            source.read_into(Value(read).view())
        read.mapped_files = source.files()  # type: ignore[attr-defined]
        return read
    view = source.mapped(windows)
    if not view.nbytes:
        return torch.UntypedStorage(0)
    made = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
    made.mapped_files = source.files()  # type: ignore[attr-defined]  # of which it shows what is not read yet
    return made


def extent(tensor: torch.Tensor) -> int:
    """Elements of the storage from the first to the last that a tensor views, both included; 0 for an empty one."""
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

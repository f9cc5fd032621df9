"""Statistics of tensors: one pass over the bytes of each, a bounded piece of it at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modelcli.checkpoints import CompositeEntry, Contents, TensorEntry
from modelcli.checkpoints.byte_comparison import numbers_of
from modelcli.live import apart, loading
from modelcli.live.opening import Live
from modelcli.live.sources import (
    COUNTED,
    budget_of,
    dtype_of,
    extent,
    is_lazy,
    named_tensors,
    near_windows,
    real_tensor,
    source_of,
)

#: Elements worked off at a time, holes between them counted: 8 MiB as float64.
CHUNK = 1 << 20

INTEGERS = frozenset(
    getattr(torch, name) for name in ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
)

#: Two values lie in each element, and torch converts none of them. None in a torch that is too old to have the dtype.
_PAIRS: torch.dtype | None = getattr(torch, "float4_e2m1fn_x2", None)

#: By the names `min`, `max`, `mean`, `std`, `zeros`, `nan` and `inf`; None for what is not defined.
Statistics = dict[str, float | None]

#: Told how many bytes have been worked off, and how many there are in all.
Progress = Callable[[int, int], None]


def _silent(_done: int, _total: int) -> None:
    """The progress of work that nobody watches."""


def of_live(live: Live, names: Sequence[str], progress: Progress = _silent) -> dict[str, Statistics]:
    """Statistics of tensors of a live model, as `collect` gives them: drawn or read only for those asked for."""
    tensors = named_tensors(live.module)
    found = collect({name: tensors[name] for name in names if name in tensors}, progress)
    others = {name for name in names if name not in tensors}
    if not others:
        return found
    entries = apart.of(live.module).tensors
    plain = {n: e for n, e in entries.items() if n in others and isinstance(e, TensorEntry) and _is_known(e)}
    return found | collect(loading.on_meta(Contents(Path(), "", plain)).tensors)


def of_contents(contents: Contents, names: Sequence[str], progress: Progress = _silent) -> dict[str, Statistics]:
    """Statistics of tensors of a checkpoint, as `collect` gives them: only the bytes of those asked for are read."""
    entries = {name: contents.rows[name] for name in names if name in contents.rows}
    plain = {name: entry for name, entry in entries.items() if isinstance(entry, TensorEntry)}
    chosen = {name: entry for name, entry in plain.items() if is_known(dtype_of(entry.dtype))}
    return collect(
        loading.on_meta(Contents(contents.path, contents.format, chosen)).tensors,
        progress,
        f"{contents.path}: what its tensors view",
    )


def of_parts(entries: Mapping[str, CompositeEntry]) -> dict[str, Statistics]:
    """How many NaNs and infinities quantized and sparse tensors are made of: those of their values, or of their scales.

    Left out are those that have no parts (on the meta device), or some that torch knows no numbers of.
    """
    looked_at = {name: entry for name, entry in entries.items() if entry.parts and all(map(_is_known, entry.parts))}
    parts = {
        f"{number} {name}": part
        for name, entry in looked_at.items()
        for number, part in enumerate(entry.parts)
        if not _is_whole(part)
    }
    found = {name: _not_finite(numbers_of(entry)) for name, entry in looked_at.items()}
    for key, statistics in collect(loading.on_meta(Contents(Path(), "", parts)).tensors).items():
        name = key.partition(" ")[2]
        found[name] = {word: (count or 0) + (statistics[word] or 0) for word, count in found[name].items()}
    return found


def _is_known(part: TensorEntry) -> bool:
    return _is_whole(part) or is_known(dtype_of(part.dtype))


def _is_whole(part: TensorEntry) -> bool:
    """Whether a part has whole numbers: indices, or the elements of a quantized tensor."""
    return part.dtype.startswith(("q", "int", "uint", "bool"))


def _not_finite(values: Sequence[object]) -> Statistics:
    """How many NaNs and infinities are among numbers, some of which stand in lists."""
    several = (value if isinstance(value, list) else [value] for value in values)
    numbers = [number for numbers in several for number in numbers if isinstance(number, float)]
    return {"nan": sum(map(math.isnan, numbers)), "inf": sum(map(math.isinf, numbers))}


def collect(
    tensors: Mapping[str, torch.Tensor], progress: Progress = _silent, what: str = "the model"
) -> dict[str, Statistics]:
    """`min`, `max`, `mean`, `std`, `zeros`, `nan` and `inf` of each tensor, by its name.

    The first four are of the finite elements, the last three count elements. `std` is `torch.std`'s, with Bessel's
    correction. The statistics of complex numbers are those of their absolute values. What is not defined is None: of
    no finite element the first four, of a single one `std`, and what float64 cannot hold. Left out are tensors without
    numbers (lazy ones, meta tensors of unknown source), quantized and sparse ones, and dtypes that are no numbers to
    torch (float4_e2m1fn_x2). What is there under several names is read once. `what` names the model in a refusal.
    """
    views: dict[tuple[Any, ...], tuple[torch.Tensor, int]] = {}
    names: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if _has_numbers(tensor):
            key = _view_of(tensor)
            if key not in views:
                views[key] = _without_repeats(tensor.detach())
            names[key].append(name)
    done, total = 0, sum(once.nbytes for once, _ in views.values())
    progress(done, total)
    budget, windows = budget_of((once for once, _ in views.values()), what), near_windows()
    found: dict[str, Statistics] = {}
    for key, (once, repeats) in views.items():
        moments = Moments()
        for number, piece in enumerate(pieces_of(once)):
            # Besides its elements, a piece takes a while by itself: many may be made of few elements far apart.
            budget.spend(COUNTED * (piece.numel() + (CHUNK // 256 if number else 0)), names[key][0])
            more = _moments_of(real_tensor(piece, windows))
            moments = moments.merged(more) if number else more
            done += piece.nbytes
            progress(done, total)
        for name in names[key]:
            found[name] = moments.repeated(repeats).statistics()
    return found


def _view_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same part of the same storage."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype


@dataclass(frozen=True)
class Moments:
    """What elements come to, so that two lots of them can be merged.

    `count` elements are finite; `low` and `high` are the least and the greatest of these, `mean` their mean, and `m2`
    the sum of their squared deviations from it. `zeros`, `nan` and `inf` count elements.
    """

    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    m2: float = 0.0
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    def merged(self, other: Moments) -> Moments:
        """Those of both together.

        T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", Stanford STAN-CS-79-773, 1979: no difference of two large sums is taken, so nothing cancels.
        """
        count = self.count + other.count
        share = other.count / count if count else 0.0
        delta = other.mean - self.mean
        return Moments(
            count,
            min(self.low, other.low),
            max(self.high, other.high),
            self.mean + delta * share,
            self.m2 + other.m2 + delta * self.count * share * delta,
            self.zeros + other.zeros,
            self.nan + other.nan,
            self.inf + other.inf,
        )

    def repeated(self, times: int) -> Moments:
        """Those of the same elements so many times over."""
        if times == 1:
            return self
        return replace(
            self,
            count=self.count * times,
            m2=self.m2 * times,
            zeros=self.zeros * times,
            nan=self.nan * times,
            inf=self.inf * times,
        )

    def statistics(self) -> Statistics:
        """The numbers to show; None for what is not defined."""
        return {
            "min": self.low if self.count else None,
            "max": self.high if self.count else None,
            "mean": _finite(self.mean) if self.count else None,
            "std": _finite(math.sqrt(self.m2 / (self.count - 1))) if self.count > 1 else None,
            "zeros": self.zeros,
            "nan": self.nan,
            "inf": self.inf,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def is_known(dtype: torch.dtype) -> bool:
    """Whether torch knows the elements of this dtype as numbers."""
    if dtype.is_floating_point:
        return dtype is not _PAIRS
    return dtype.is_complex or dtype in INTEGERS


def _has_numbers(tensor: torch.Tensor) -> bool:
    if is_lazy(tensor) or not is_known(tensor.dtype) or tensor.layout != torch.strided:
        return False
    return source_of(tensor) is not None


def _without_repeats(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A view in which an expanded tensor has each of its elements once, and how many times it has them."""
    repeats = 1
    for axis, (size, stride) in enumerate(zip(tensor.size(), tensor.stride(), strict=True)):
        if not stride and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
            repeats *= size
    return tensor, repeats


def pieces_of(view: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views that have each element of a view once; none has, or spans, more than CHUNK elements.

    Elements near one another in the storage stay together: the axis with the longest stride is cut.
    """
    if max(view.numel(), extent(view)) <= CHUNK:
        if view.numel():
            yield view
        return
    axis = max((axis for axis in range(view.dim()) if view.size(axis) > 1), key=view.stride)
    size = view.size(axis)
    # At most a half: where strides overlap, a short stretch of storage can hold any number of elements.
    step = max(1, min(CHUNK // max(view.stride(axis), 1), (size + 1) // 2))
    for start in range(0, size, step):
        yield from pieces_of(view.narrow(axis, start, min(step, size - start)))


def _moments_of(piece: torch.Tensor) -> Moments:
    """The moments of a real tensor, all of it converted to float64."""
    if piece.numel() == 1 and not piece.is_complex():
        return _moments_of_one(piece.item())
    # A copy in any case: what follows works in place, and the bytes are a model's own.
    if piece.is_complex():
        numbers = piece.to(torch.complex128).abs().flatten()
    else:
        numbers = piece.to(torch.float64, copy=True).flatten()
    zeros = numbers.numel() - int(numbers.count_nonzero())
    nan = inf = 0
    total = numbers.sum().item()
    if not math.isfinite(total):  # one pass tells of all elements; it overflows on finite ones as well
        nan, inf = int(numbers.isnan().sum()), int(numbers.isinf().sum())
        numbers = numbers[numbers.isfinite()]
        total = numbers.sum().item()
    count = numbers.numel()
    if not count:
        return Moments(zeros=zeros, nan=nan, inf=inf)
    low, high = _integer_range(piece) if piece.dtype in INTEGERS else _range(numbers)
    mean = total / count
    m2 = numbers.sub_(mean).square_().sum().item()
    return Moments(count, low, high, mean, m2, zeros, nan, inf)


def _moments_of_one(number: float) -> Moments:
    """The moments of a single number: a checkpoint may have 100,000 scales, and a step of torch's takes longer."""
    if not math.isfinite(number):
        return Moments(nan=int(math.isnan(number)), inf=int(math.isinf(number)))
    return Moments(1, number, number, float(number), 0.0, zeros=int(not number))


def _range(numbers: torch.Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(numbers)
    return low.item(), high.item()


def _integer_range(piece: torch.Tensor) -> tuple[float, float]:
    """The least and the greatest of whole numbers, exactly: float64 has no odd ones beyond 2^53."""
    if piece.dtype is not torch.uint64:
        return _range(piece.to(torch.int64))
    # torch does not order uint64: with the highest bit flipped, int64 has the same order.
    low, high = _range(piece.view(torch.int64) ^ -(2**63))
    return low + 2**63, high + 2**63

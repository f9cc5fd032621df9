"""Check whether the CPU would run each operator of a forward pass on the meta device.

The meta device computes shapes and checks little: it multiplies float32 by bfloat16, takes a softmax over an axis that
does not exist, and gives a transposed convolution the wrong channels. This module checks of each operator

- the dtypes: it tries the operator on the CPU with a few elements of the same dtypes and numbers of dimensions. If the
  CPU refuses them and accepts the same operands in other dtypes, the dtypes are wrong.
- the shapes: there is a rule for each operator whose shapes the meta device is known not to check.

It does not check what depends on values (whether an index is in range, whether a matrix can be inverted).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.live.describe import dtype_name
from modelcli.live.rules import RefusedError, text_of
from modelcli.wording import counted


class OperatorError(RefusedError):
    """Ends a forward pass at an operator that the CPU refuses. `mixed` says whether its operands differ in dtype."""

    def __init__(self, name: str, operands: Sequence[torch.Tensor], reason: str) -> None:
        shown = [text_of(operand) for operand in operands[:5]] + ["..."] * (len(operands) > 5)
        super().__init__(f"PyTorch does not run {name} on {', '.join(shown)}: {reason}")
        self.mixed = len({operand.dtype for operand in operands if operand.dtype.is_floating_point}) > 1


class OperatorRules(TorchDispatchMode):
    """Ends a forward pass on meta, with an OperatorError, at the first operator that the CPU would refuse.

    If the meta device refuses an operator that the CPU runs, the shape comes from the CPU.

    Attributes:
        unchecked: why an operator could not be checked, by name; the CPU may lack a kernel that a GPU has.
        tables: the tensors in which the pass looked up indices, whose range was not checked.
        answered: called with an operator, its arguments and its output if the output comes from the CPU, because outer
            modes do not get that operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unchecked: dict[str, str] = {}
        self.tables: list[torch.Tensor] = []
        self.answered: Callable[[Any, Any, Any, Any], None] | None = None
        self._threads: list[int] = []
        self._tried: dict[Any, Exception | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, so torch need not import torch._dynamo at the first operator."""
        return False

    def __enter__(self) -> Self:
        """Use one thread: for a few elements, several are a hundred times slower on a busy machine."""
        self._threads.append(torch.get_num_threads())
        torch.set_num_threads(1)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, place)  # type: ignore[no-untyped-call]
        torch.set_num_threads(self._threads.pop())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let the meta device compute the shapes, then apply the rules."""
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            if (instead := _as_on_cpu(func, given, error)) is None:
                raise
            if self.answered is not None:
                self.answered(func, args, kwargs, instead)
            return instead
        name = func._schema.name.rpartition("::")[2]
        if name not in _NEVER_REFUSED and not func.is_view:
            self._judge(func, name, given, result)
        return result

    def _judge(self, func: Any, name: str, given: Mapping[str, Any], result: Any) -> None:
        operands = _tensors(given)
        if not all(map(_is_plain, operands)) or not (operands or name in _RANDOM):
            return
        rule = _SHAPE_RULES.get(name) or _SHAPE_RULES.get(name.rstrip("_"))
        if rule is not None and (expects := rule(given)) is not None:
            raise OperatorError(name, operands, f"it expects {expects}")
        if name in _LOOK_UPS:
            self.tables.append(operands[0])
        tries = _smaller(name, given)
        if any(not tensor.numel() for tensor in _tensors(result)):
            tries = itertools.chain(_as_they_are(given), tries)  # with an empty output, the CPU checks little
        for small in tries:
            refusal = self._refusal(func, small)
            if refusal is None:
                return
            if not operands or any(self._refusal(func, other) is None for other in _in_other_dtypes(small)):
                if not _is_missing_kernel(refusal, operands):
                    raise OperatorError(name, operands, _first_line(refusal))
                dtype = next(operand.dtype for operand in operands if operand.dtype.is_floating_point)
                self.unchecked[name] = f"PyTorch has no {name} for {dtype_name(dtype)} on the CPU"
                return

    def _refusal(self, func: Any, given: Mapping[str, Any]) -> Exception | None:
        """Return the CPU's error for an operator on such operands if it fails for zeros and for ones; else None."""
        key = (func, tuple(given.items()))
        if key not in self._tried:
            first, second = (_run(func, given, value) for value in (1, 0))
            both = isinstance(first, _Refusal) and isinstance(second, _Refusal)
            self._tried[key] = first.error if both else None
        return self._tried[key]


@dataclass(frozen=True)
class _Operand:
    """A tensor without values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def filled(self, value: int) -> torch.Tensor:
        return torch.full(self.shape, value, dtype=self.dtype, device="cpu")


@dataclass(frozen=True)
class _Refusal:
    """The error that the CPU raised."""

    error: Exception


#: Operators, besides views, that run on any dtype and on any shape that the meta device accepts.
_NEVER_REFUSED = frozenset(
    """
    _local_scalar_dense _reshape_alias _to_copy _unsafe_view alias clone copy copy_ detach empty_like empty_strided
    full_like lift_fresh new_empty new_empty_strided new_full new_ones new_zeros ones_like resize_ set_ zeros_like
    """.split()  # noqa: SIM905 - a list of so many words is read more easily
)

#: Operators that look up indices in their first operand.
_LOOK_UPS = frozenset(("embedding", "_embedding_bag", "_embedding_bag_forward_only"))

#: Operators without operands that have no kernel for some dtypes.
_RANDOM = frozenset(("rand", "randn", "normal"))

#: Operators that behave differently if there is nothing to do, such as resampling two pixels to two.
_RESAMPLING = re.compile("_?upsample_.*")

#: The dtypes to try if the CPU refuses the operands in their own.
_COMMON_DTYPES = (torch.float32, torch.int64, torch.bool)
#: The most combinations of dtypes to try.
_MOST_TRIES = 1_000
#: The most elements to try an operator on at full size, if it accepts no smaller operands.
_MOST_ELEMENTS = 1 << 18


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, Mapping):
        yield from _flat(list(value.values()))
    else:
        yield value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf of a value. Lists become tuples, which can be dictionary keys."""
    if isinstance(value, tuple | list):
        return tuple(_mapped(item, change) for item in value)
    return change(value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _flat((value,)) if isinstance(leaf, torch.Tensor)]


def _run(func: Any, given: Mapping[str, Any], value: int) -> Any:
    """Run an operator on the CPU without the dispatch modes of the pass. Returns a _Refusal if it raises."""

    def real(leaf: Any) -> Any:
        return leaf.filled(value) if isinstance(leaf, _Operand) else leaf

    keywords = {argument.name for argument in func._schema.arguments if argument.kwarg_only}
    with torch._C._DisableTorchDispatch():
        made = {name: _mapped(leaf, real) for name, leaf in given.items()}
        try:
            return func(
                *(leaf for name, leaf in made.items() if name not in keywords),
                **{name: leaf for name, leaf in made.items() if name in keywords},
            )
        except Exception as error:
            return _Refusal(error)


def _as_on_cpu(func: Any, given: Mapping[str, Any], error: Exception) -> Any:
    """Return the CPU's output, without values, for an operator that its meta kernel refuses.

    None if the CPU refuses it too, and for an operator without a meta kernel, whose output shape depends on values.
    """
    if re.search("register_meta|[Mm]eta [Tt]ensor|'Meta' backend|Meta kernel", str(error)):
        return None
    name = func._schema.name
    for same in _as_they_are(given):
        outcomes = [_run(func, same, value) for value in (0, 1)]
        shapes = [[(tensor.shape, tensor.dtype) for tensor in _tensors(outcome)] for outcome in outcomes]
        if any(isinstance(outcome, _Refusal) for outcome in outcomes) or shapes[0] != shapes[1]:
            return None
        if not shapes[0] or not _tensors(given):
            return None
        if func._schema.is_mutable:
            return given["self"] if name.endswith("_") and "self" in given else None
        device = _tensors(given)[0].device  # under fake tensors, the device that they claim
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes[0]]
        return made[0] if isinstance(outcomes[0], torch.Tensor) else type(outcomes[0])(made)
    return None


def _smaller(name: str, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the same call on ever larger operands: at most two elements along each axis, then along fewer of them."""
    if name in _SMALL:
        yield _resized(given, lambda length, _axis, _rank: length) | _SMALL[name](given)
    if not _RESAMPLING.fullmatch(name):
        yield _resized(given, lambda length, _axis, _rank: min(length, 2), ints=lambda length: min(length, 2))
        yield _resized(given, lambda length, _axis, _rank: min(length, 2))
    for kept in (1, 2, 3):
        yield from _affordable(_resized(given, partial(_but_the_last, kept)))
    yield from _as_they_are(given)


def _but_the_last(kept: int, length: int, axis: int, rank: int) -> int:
    return length if axis >= rank - kept else min(length, 2)


def _as_they_are(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    return _affordable(_resized(given, lambda length, _axis, _rank: length))


def _affordable(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if _elements(given) <= _MOST_ELEMENTS:
        yield given


def _resized(
    given: Mapping[str, Any],
    size: Callable[[int, int, int], int],
    ints: Callable[[int], int] | None = None,
) -> dict[str, Any]:
    """Return a call without values and with other sizes.

    Args:
        given: the arguments by name.
        size: gives the new length of an axis from its length, its index and the number of axes.
        ints: gives the new value of each number in a list of ints, such as the shape of a norm; None keeps them.
    """

    def operand(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            rank = leaf.dim()
            return _Operand(tuple(size(length, axis, rank) for axis, length in enumerate(leaf.shape)), leaf.dtype)
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def argument(value: Any) -> Any:
        if ints is not None and isinstance(value, tuple | list) and all(type(item) is int for item in value):
            return tuple(map(ints, value))
        return _mapped(value, operand)

    return {name: argument(value) for name, value in given.items()}


def _elements(given: Mapping[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in _flat(given) if isinstance(leaf, _Operand))


def _small_convolution(given: Mapping[str, Any]) -> dict[str, Any]:
    """One channel per group, at most two groups, and a kernel size for which PyTorch always asks oneDNN."""
    flow, weight, bias = (given[name] for name in ("input", "weight", "bias"))
    spatial = weight.dim() - 2
    groups = min(given["groups"], 2)
    ones, zeros, kernel = (1,) * spatial, (0,) * spatial, (4,) * spatial
    small: dict[str, Any] = {
        "input": _Operand((min(flow.shape[0], 2), min(flow.shape[1], groups), *kernel), flow.dtype),
        "weight": _Operand((groups, 1, *kernel), weight.dtype),
        "stride": ones,
        "padding": zeros,
        "dilation": ones,
        "output_padding": zeros,
        "groups": groups,
    }
    return small | ({} if bias is None else {"bias": _Operand((groups,), bias.dtype)})


def _small_group_norm(given: Mapping[str, Any]) -> dict[str, Any]:
    """One channel per group, at most two groups."""
    groups = min(given["group"], 2)
    batch, size = min(given["N"], 1), min(given["HxW"], 1)
    small: dict[str, Any] = {"input": _Operand((batch, groups, size), given["input"].dtype)}
    for name in ("weight", "bias"):
        if given[name] is not None:
            small[name] = _Operand((groups,), given[name].dtype)
    return small | {"N": batch, "C": groups, "HxW": size, "group": groups}


_SMALL: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "convolution": _small_convolution,
    "convolution_overrideable": _small_convolution,
    "native_group_norm": _small_group_norm,
}


def _in_other_dtypes(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the same call with other dtypes; equal dtypes within one argument change together."""
    kinds = list(
        dict.fromkeys(
            (name, leaf.dtype) for name, value in given.items() for leaf in _flat(value) if isinstance(leaf, _Operand)
        )
    )
    tries = itertools.product(_COMMON_DTYPES, repeat=len(kinds))
    for dtypes in itertools.islice(tries, _MOST_TRIES):
        chosen = dict(zip(kinds, dtypes, strict=True))

        def other(name: str, value: Any, chosen: Mapping[Any, torch.dtype] = chosen) -> Any:
            def leaf_in(leaf: Any) -> Any:
                return _Operand(leaf.shape, chosen[name, leaf.dtype]) if isinstance(leaf, _Operand) else leaf

            return _mapped(value, leaf_in)

        yield {name: other(name, value) for name, value in given.items()}


def _is_missing_kernel(refusal: Exception, operands: Iterable[torch.Tensor]) -> bool:
    """Whether the CPU only lacks a kernel for the narrow floating-point dtype (less than 4 bytes) of all operands."""
    floating = {operand.dtype for operand in operands if operand.dtype.is_floating_point}
    short = len(floating) == 1 and next(iter(floating)).itemsize < 4
    lacks = r"not implemented for '(Half|BFloat16|Float8\w+)'|Unsupported dtype (Half|BFloat16)"
    return short and re.search(lacks, str(refusal)) is not None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


Rule = Callable[[Mapping[str, Any]], str | None]


def _convolution(given: Mapping[str, Any]) -> str | None:
    """The checks of `check_shape_forward` in ATen/native/Convolution.cpp."""
    flow, weight, bias = given["input"], given["weight"], given["bias"]
    groups, transposed = given["groups"], given["transposed"]
    spatial = weight.dim() - 2
    padding, stride, dilation = (_each(given[name], spatial) for name in ("padding", "stride", "dilation"))
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if flow.dim() != weight.dim():
        return f"{weight.dim()} dimensions, like its weight"
    if any(size < 0 for size in padding):
        return f"a padding of at least 0, not {padding}"
    if weight.shape[0] % groups:
        return f"a weight whose output channels are divisible by {groups} groups"
    if flow.shape[1] != channels:
        return counted(channels, "channel")
    if bias is not None and tuple(bias.shape) != (outputs,):
        return f"a bias of [{outputs}]"
    if transposed and flow.numel():
        extra = _each(given["output_padding"], spatial)
        if any(more >= step and more >= gap for more, step, gap in zip(extra, stride, dilation, strict=True)):
            return f"an output padding smaller than its stride or its dilation, not {extra}"
    if flow.shape[0] and flow.shape[1] and 0 in flow.shape[2:]:
        return "no empty axis"
    if not transposed:  # the meta device of older releases does not check it
        sizes = [size + 2 * more for size, more in zip(flow.shape[2:], padding, strict=True)]
        kernel = [step * (size - 1) + 1 for size, step in zip(weight.shape[2:], dilation, strict=True)]
        if any(size < needed for size, needed in zip(sizes, kernel, strict=True)):
            return f"a padded input of at least {kernel}, the size of its kernel, not {sizes}"
    return None


def _each(value: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(value) * count if len(value) == 1 else tuple(value)


def _axis(given: Mapping[str, Any]) -> str | None:
    flow, axis = given["self"], given.get("dim", -1)
    rank = max(flow.dim(), 1)
    return None if -rank <= axis < rank else f"an axis {axis}, but there are {flow.dim()} axes"


def _chosen_along(given: Mapping[str, Any]) -> str | None:
    """`max` and similar operators need elements along the axis."""
    flow, axis = given["self"], given.get("dim")
    if axis is None or (wrong := _axis(given)) is not None:
        return None if axis is None else wrong
    return "at least one element along the axis" if flow.dim() and flow.shape[axis] == 0 else None


def _pixel_unshuffle(given: Mapping[str, Any]) -> str | None:
    factor, sizes = given["downscale_factor"], given["self"].shape[-2:]
    return f"a height and width divisible by {factor}" if any(size % factor for size in sizes) else None


def _resampled(given: Mapping[str, Any]) -> str | None:
    if 0 in given["self"].shape[1:]:
        return "no empty axis after the batch"
    return "an output that is not empty" if 0 in tuple(given.get("output_size") or ()) else None


def _no_empty_axis(name: str, first: int) -> Rule:
    def rule(given: Mapping[str, Any]) -> str | None:
        return "no empty axis" if 0 in given[name].shape[first:] else None

    return rule


def _loss_of_images(given: Mapping[str, Any]) -> str | None:
    flow, target = given["self"], given["target"]
    if target.dim() != 3:
        return f"a target of 3 dimensions, not {target.dim()}"
    return "at least one class" if target.numel() and flow.shape[1] == 0 else None


def _loss_of_classes(given: Mapping[str, Any]) -> str | None:
    flow, target = given["self"], given["target"]
    if flow.dim() == 1 and target.numel() != 1:
        return "a target of one element"
    if target.numel() and flow.shape[-1] == 0:
        return "at least one class"
    known = target.dtype in (torch.int64, torch.uint8)
    return None if known else f"a target of int64 or uint8, not {dtype_name(target.dtype)}"


def _drawn(given: Mapping[str, Any]) -> str | None:
    flow = given["self"]
    if not flow.dtype.is_floating_point:
        return "floating-point values"
    enough = given.get("replacement", False) or given["num_samples"] <= flow.shape[-1]
    return None if enough else f"at least {given['num_samples']} elements to draw from"


def _added_product(given: Mapping[str, Any]) -> str | None:
    rows = given["mat"].shape[0]
    return None if given["self"].shape in ((), (1,), (rows,)) else f"[{rows}] as the tensor to add"


def _index_along(given: Mapping[str, Any]) -> str | None:
    flow, index, axis = given["self"], given["index"], given["dim"]
    if flow.dim() and index.numel() and flow.shape[axis] == 0:
        return f"at least one element along axis {axis}"
    return None


def _index_select(given: Mapping[str, Any]) -> str | None:
    flow, index = given["self"], given["index"]
    if index.dim() > 1:
        return f"an index of one dimension, not {index.dim()}"
    if not flow.dim() and index.numel() != 1:
        return "an index of one element"
    return _index_along(given) or _index_dtype(given)


def _index_dtype(given: Mapping[str, Any]) -> str | None:
    dtype = given["index"].dtype
    return None if dtype in (torch.int32, torch.int64) else f"an index of int64 or int32, not {dtype_name(dtype)}"


def _index_fill(given: Mapping[str, Any]) -> str | None:
    dtype = given["index"].dtype
    return None if dtype == torch.int64 else f"an index of int64, not {dtype_name(dtype)}"


def _index(given: Mapping[str, Any]) -> str | None:
    flow, indices = given["self"], given["indices"]
    for axis, index in enumerate(indices):
        by_number = index is not None and index.dtype not in (torch.bool, torch.uint8)
        if by_number and index.numel() and flow.shape[axis] == 0:
            return f"at least one element along axis {axis}"
    return None


def _index_add(given: Mapping[str, Any]) -> str | None:
    flow, source, axis = given["self"], given["source"], given["dim"]
    if not flow.dim() or not source.dim():
        return None
    axis %= flow.dim()
    same = flow.dim() == source.dim() and all(
        there == here for at, (there, here) in enumerate(zip(flow.shape, source.shape, strict=True)) if at != axis
    )
    return None if same else f"a source of shape {list(flow.shape)}, except for axis {axis}"


def _scatter_add(given: Mapping[str, Any]) -> str | None:
    """A check of `scatter_shape_check` in ATen/native/ScatterGatherChecks.h which an older meta device lacks."""
    index = given["index"]
    for what in ("self", "src"):
        rank = max(given[what].dim(), 1)
        if index.numel() and max(index.dim(), 1) != rank:
            return f"an index of {counted(rank, 'dimension')}, not {index.dim()}"
    return None


def _index_put(given: Mapping[str, Any]) -> str | None:
    flow, values, indices = given["self"], given["values"], given["indices"]
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None  # the number of elements that a mask picks is not known
    try:
        place = torch.ops.aten.index.Tensor(flow, list(indices)).shape
        fits = torch.broadcast_shapes(place, values.shape) == place
    except Exception:
        fits = False
    return None if fits else "values that broadcast to the indexed shape"


_SHAPE_RULES: Mapping[str, Rule] = {
    "convolution": _convolution,
    **dict.fromkeys(("_softmax", "_log_softmax", "cummax", "cummin"), _axis),
    **dict.fromkeys(("max", "min", "median", "nanmedian", "mode"), _chosen_along),
    "pixel_unshuffle": _pixel_unshuffle,
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"), _resampled),
    **dict.fromkeys(("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), _resampled),
    "_adaptive_avg_pool2d": _no_empty_axis("self", -2),
    "_adaptive_avg_pool3d": _no_empty_axis("self", -3),
    "grid_sampler_2d": _no_empty_axis("input", 2),
    "grid_sampler_3d": _no_empty_axis("input", 2),
    "nll_loss_forward": _loss_of_classes,
    "nll_loss2d_forward": _loss_of_images,
    "multinomial": _drawn,
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), _no_empty_axis("self", 0)),
    "addmv": _added_product,
    "gather": _index_along,
    "index": _index,
    "index_select": _index_select,
    "index_fill": _index_fill,
    "index_add": _index_add,
    "index_put": _index_put,
    "scatter_add": _scatter_add,
}

"""Counting multiply-accumulates: a dispatch mode that sees every operator of a forward pass.

torch's own registry (`torch.utils.flop_counter`) has formulas for `mm`, `addmm`, `bmm`, `baddbmm` and convolutions;
here stand those that it lacks. An operator that multiplies and has no formula is named in `uncounted`, so that nobody
takes the total for more than a lower bound. Elementwise products, norms, poolings and interpolations count nothing, as
in the figures that libraries publish of their models. What a provider's library has in operators, the provider says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.live import providers

#: What gives the multiply-accumulates of one call, from its arguments and its output.
Formula = Callable[..., int]

#: Names of operators that multiply: products of matrices and vectors, convolutions, attention, recurrent layers,
#: distances, decompositions, Fourier transforms. One of these without a formula is named in `uncounted`.
_MULTIPLIES = re.compile(
    r"(mm|mv|addr|v?dot|gru|lstm|moe)(_|\d|$)|conv(?!ert)|linear|matmul|attention|encoder_layer|rnn|[cp]dist|_dist"
    r"|fft_[cr]2[cr]|linalg_|cholesky|householder|_solve|lu_with|lu_factor|ormqr|orgqr|geqrf|matrix_exp|grouped|gemm|einsum"
)
#: What these names have in common with the others, though it multiplies no matrices.
_MULTIPLIES_NOT = re.compile(
    r"upsample|thnn_fused|prepack|pack_gemm|pack_quantized|quantize_weight|reorder|flatten_weight|calculate_mkldnn"
    r"|linalg_(cross|vector_norm|diagonal|vander|_powsum)|_linalg_check_errors|nested_|convert"
)
#: Libraries whose operators are known; those of any other are named in `uncounted`, for nothing says what they do.
_KNOWN_LIBRARIES = frozenset(
    {"aten", "prim", "prims", "profiler", "quantized", "_quantized", "mkldnn", "onednn", "inductor"}
)
#: Questions about a tensor's layout: what they return decides nothing here, and some tensors answer them themselves.
_QUESTIONS = frozenset(
    {"sym_is_contiguous", "is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "size", "sym_size"}
    | {"stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel", "dim", "layout"}
)


def _by_last_axis(first: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """A product of `first`, (..., K), with a matrix of any packing: K for each element of the output."""
    packed = 2 if "x2" in str(first.dtype) else 1  # two numbers lie in an element of float4_e2m1fn_x2
    return _elements(out) * first.shape[-1] * packed


def _mv(matrix: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    return matrix.numel()


def _addmv(_added: torch.Tensor, matrix: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    return matrix.numel()


def _addr(_added: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    return one.numel() * other.numel()


#: Products of which an operand may be sparse, each with the place of its first factor among the arguments.
_OF_SPARSE = {"mm": 0, "bmm": 0, "mv": 0, "_sparse_mm": 0, "addmm": 1, "addmv": 1, "baddbmm": 1, "_sparse_addmm": 1}


def _of_stored(one: torch.Tensor, other: torch.Tensor) -> int:
    """A product with a sparse matrix: each element that it stores meets a row, or a column, of the other operand.

    Raises ValueError where both are sparse: then the positions decide.
    """
    if _is_sparse(one) and _is_sparse(other):
        raise ValueError("both operands are sparse")
    if _is_sparse(one):
        return _stored(one) * (other.shape[-1] if other.dim() > 1 else 1)
    return _stored(other) * one.shape[-2]


def _is_sparse(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout != torch.strided


def _stored(sparse: torch.Tensor) -> int:
    """How many elements a sparse tensor stores, those of whole blocks included."""
    return (sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()).numel()


def _batched(
    _added: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any
) -> int:
    """`addbmm`, (B, N, K) by (B, K, M): the products are added up, and are made all the same."""
    return one.numel() * other.shape[-1]


def _grouped_mm(one: torch.Tensor, other: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """`torch.nn.functional.grouped_mm`: the groups lie along an axis of whichever operand has two dimensions.

    Rows (T, K) by G matrices (K, N) take each row through one matrix: T*K*N. (G, M, K) by (K, N) deals the columns
    out: M*K*N. Two of two dimensions deal out K: M*K*N. Two of three dimensions are a `bmm`: G*M*K*N.
    """
    if one.dim() == 3 and other.dim() == 2:
        return one.shape[-2] * one.shape[-1] * other.shape[-1]
    return one.numel() * other.shape[-1]


def _foreach_mm(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor], *_a: Any, out: Any, **_k: Any) -> int:
    return sum(one.numel() * other.shape[-1] for one, other in zip(ones, others, strict=True))


def _trilinear(
    one: torch.Tensor,
    two: torch.Tensor,
    three: torch.Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    *_args: Any,
    out: Any,
    **_kwargs: Any,
) -> int:
    """`bilinear`, as its einsum `bi,oij,bj->bo` does it: the first two, then their product with the third."""
    rank = one.dim() + len(expand1)
    sizes = [_unsqueezed(t.shape, e, rank) for t, e in ((one, expand1), (two, expand2), (three, expand3))]
    both = [max(pair) for pair in zip(sizes[0], sizes[1], strict=True)]
    left = [1 if axis in sumdim and axis in expand3 else size for axis, size in enumerate(both)]
    return prod(both) + prod(max(pair) for pair in zip(left, sizes[2], strict=True))


def _unsqueezed(shape: Sequence[int], expanded: Sequence[int], rank: int) -> list[int]:
    rest = iter(shape)
    return [1 if axis in expanded else next(rest) for axis in range(rank)]


def _conv_tbc(_input: torch.Tensor, weight: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """Weights are (kernel, channels in, channels out): each element of the output takes kernel * channels in."""
    return _elements(out) * weight.shape[0] * weight.shape[1]


def _distances(one: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """`cdist`, `pdist`: a multiply-accumulate for each coordinate of each pair."""
    return _elements(out) * one.shape[-1]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any
) -> int:
    """Scores and their product with the values: (..., L, E), (..., S, E), (..., S, V) take L*S*(E+V) a head.

    Heads are those of the query, several of which may share keys and values. A causal mask spares nothing.
    """
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _mkldnn_rnn_layer(
    flows_in: torch.Tensor, into: torch.Tensor, recurrent: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any
) -> int:
    """One layer in one direction: both weight matrices at each step of each sequence."""
    return flows_in.numel() // flows_in.shape[-1] * (into.numel() + recurrent.numel())


def _packed_conv(_input: torch.Tensor, packed: Any, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """A quantized convolution, whose weights only unpacking shows."""
    weight: torch.Tensor = packed.unpack()[0]
    return _elements(out) * weight[0].numel()


def _elements(out: Any) -> int:
    return int((out if isinstance(out, torch.Tensor) else out[0]).numel())


_FORMULAS: Mapping[str, Formula] = {
    **dict.fromkeys(("aten::mv", "aten::dot", "aten::vdot"), _mv),
    "aten::addmv": _addmv,
    "aten::addr": _addr,
    "aten::addbmm": _batched,
    "aten::_foreach_mm": _foreach_mm,
    "aten::_trilinear": _trilinear,
    "aten::conv_tbc": _conv_tbc,
    **dict.fromkeys(("aten::_cdist_forward", "aten::_euclidean_dist", "aten::_pdist_forward"), _distances),
    **dict.fromkeys(("aten::_grouped_mm", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2"), _grouped_mm),
    **dict.fromkeys(
        (
            *("aten::_int_mm", "aten::_scaled_mm", "aten::_scaled_mm_v2", "aten::_weight_int8pack_mm"),
            *("aten::_weight_int4pack_mm", "aten::_weight_int4pack_mm_for_cpu", "aten::_mixed_dtypes_linear"),
            *("aten::_weight_int4pack_mm_with_scales_and_zeros", "aten::_dyn_quant_matmul_4bit"),
            *("aten::_sparse_semi_structured_linear", "aten::mkldnn_linear", "mkldnn::_linear_pointwise"),
            *("aten::fbgemm_linear_fp16_weight", "aten::fbgemm_linear_fp16_weight_fp32_activation"),
            *("aten::fbgemm_linear_int8_weight", "aten::fbgemm_linear_int8_weight_fp32_activation"),
            *("quantized::linear", "quantized::linear_relu", "quantized::linear_dynamic"),
            *("quantized::linear_relu_dynamic", "quantized::linear_dynamic_fp16", "quantized::linear_leaky_relu"),
        ),
        _by_last_axis,
    ),
    **{f"quantized::conv{n}d{end}": _packed_conv for n in (1, 2, 3) for end in ("", "_relu", "_dynamic")},
    **dict.fromkeys(
        (
            *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
            *("aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention"),
            *("aten::_scaled_dot_product_fused_attention_overrideable",),
            *("aten::_scaled_dot_product_attention_math_for_mps",),
        ),
        _attention,
    ),
    "aten::mkldnn_rnn_layer": _mkldnn_rnn_layer,
}


class MultAdds(TorchDispatchMode):
    """Counts in `total` the multiply-accumulates of all that runs inside it; it needs no gradients.

    `uncounted` are the operators that multiply and that nothing says of how often, by name, in the order they ran.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # brings Triton with it: not before it is needed

        self.total = 0
        self.uncounted: dict[str, None] = {}
        self._registry: Mapping[Any, Formula] = flop_registry
        halves = list(providers.in_use())
        self._own = {name: formula for half in halves for name, formula in half.formulas().items()}
        self._known_libraries = _KNOWN_LIBRARIES.union(*(half.operator_libraries for half in halves))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            out = func(*args, **kwargs)
            self._add(str(func), self._registry.get(func), args, kwargs, out, multiplies=True)
            return out
        name = func._schema.name
        if name.partition("::")[2] in _QUESTIONS:
            return NotImplemented
        if not self._has_formula(func, args) and (made := self._decomposed(func, args, kwargs)) is not NotImplemented:
            return made
        out = func(*args, **kwargs)
        self.count(func, args, kwargs, out)
        return out

    def count(self, func: OpOverload, args: Any, kwargs: Any, out: Any) -> None:
        """Add what one operator multiplies. For a mode inside this one, which got the output in a way of its own."""
        formula, doubled = self._formula(func, args)
        name = func._schema.name
        self._add(name, formula, args, kwargs, out, doubled=doubled, multiplies=self._multiplies(name))

    def _multiplies(self, name: str) -> bool:
        library, _, own = name.partition("::")
        return library not in self._known_libraries or _sounds_like_a_product(own)

    def _has_formula(self, func: OpOverload, args: Any) -> bool:
        return self._formula(func, args)[0] is not None

    def _formula(self, func: OpOverload, args: Any) -> tuple[Formula | None, bool]:
        """The formula of an operator, and whether it counts a multiply-accumulate as two, as torch's own do."""
        name = func._schema.name
        place = _OF_SPARSE.get(name.partition("::")[2].removesuffix("_"))
        if place is not None and any(map(_is_sparse, args[place : place + 2])):
            return (lambda *given, **_: _of_stored(*given[place : place + 2])), False
        for known in (self._own, _FORMULAS):
            if (own := known.get(name) or known.get(name.removesuffix("_"))) is not None:
                return own, False
        packet = func.overloadpacket
        return self._registry.get(packet) or self._in_place(packet, name), True

    def _in_place(self, packet: Any, name: str) -> Formula | None:
        """The formula of `addmm` for `addmm_`."""
        library, _, own = name.partition("::")
        if library != "aten" or not own.endswith("_") or own.endswith("__"):
            return None
        return self._registry.get(getattr(torch.ops.aten, own.removesuffix("_"), None))

    def _decomposed(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """What an operator that consists of others gives: in inference mode these are not taken apart before."""
        if func.namespace == "prim":  # questions about a tensor, which no dispatcher knows
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    def _add(
        self,
        name: str,
        formula: Formula | None,
        args: Any,
        kwargs: Any,
        out: Any,
        *,
        multiplies: bool,
        doubled: bool = True,
    ) -> None:
        if formula is None:
            if multiplies:
                self.uncounted[name] = None
            return
        try:
            # torch's own count a multiply-accumulate as two, and take the output by another name.
            self.total += formula(*args, **kwargs, out_val=out) // 2 if doubled else formula(*args, **kwargs, out=out)
        except Exception:  # an overload with other arguments, a size that only values decide
            self.uncounted[name] = None


@cache
def _sounds_like_a_product(own: str) -> bool:
    """Whether an operator of a known library multiplies, by its name without that of the library."""
    return _MULTIPLIES.search(own) is not None and _MULTIPLIES_NOT.search(own) is None

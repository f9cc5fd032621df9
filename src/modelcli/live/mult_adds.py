"""Count multiply-accumulates with a dispatch mode, which gets every operator of a forward pass.

torch's own registry (`torch.utils.flop_counter`) has formulas for `mm`, `addmm`, `bmm`, `baddbmm` and convolutions;
this module has the missing ones, and a provider has those for the operators of its library. `uncounted` names the
operators that multiply and have no formula, because with them the total is only a lower bound. Elementwise products,
norms, poolings and interpolations count as 0, as in the figures that libraries publish about their models.
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

#: Computes the multiply-accumulates of one call from its arguments and its output.
Formula = Callable[..., int]

#: The names of operators that multiply: products of matrices and vectors, convolutions, attention, recurrent layers,
#: distances, decompositions, Fourier transforms.
_MULTIPLIES = re.compile(
    r"(mm|mv|addr|v?dot|gru|lstm|moe)(_|\d|$)|conv(?!ert)|linear|matmul|attention|encoder_layer|rnn|[cp]dist|_dist"
    r"|fft_[cr]2[cr]|linalg_|cholesky|householder|_solve|lu_with|lu_factor|ormqr|orgqr|geqrf|matrix_exp|grouped|gemm|einsum"
)
#: The names that match `_MULTIPLIES` but belong to operators that multiply no matrices.
_MULTIPLIES_NOT = re.compile(
    r"upsample|thnn_fused|prepack|pack_gemm|pack_quantized|quantize_weight|reorder|flatten_weight|calculate_mkldnn"
    r"|linalg_(cross|vector_norm|diagonal|vander|_powsum)|_linalg_check_errors|nested_|convert"
)
#: The libraries whose operators modelcli knows. Any operator of another library may multiply.
_KNOWN_LIBRARIES = frozenset(
    {"aten", "prim", "prims", "profiler", "quantized", "_quantized", "mkldnn", "onednn", "inductor"}
)
#: Queries of a tensor's layout. They compute nothing, and some tensor classes answer them themselves.
_QUESTIONS = frozenset(
    {"sym_is_contiguous", "is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "size", "sym_size"}
    | {"stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel", "dim", "layout"}
)


def _by_last_axis(first: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """Product of `first`, (..., K), with a matrix in any packing: K for each element of the output."""
    packed = 2 if "x2" in str(first.dtype) else 1  # an element of float4_e2m1fn_x2 holds two values
    return _elements(out) * first.shape[-1] * packed


def _mv(matrix: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    return matrix.numel()


def _addmv(_added: torch.Tensor, matrix: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    return matrix.numel()


def _addr(_added: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    return one.numel() * other.numel()


#: Products that accept a sparse operand, each with the position of its first factor in the arguments.
_OF_SPARSE = {"mm": 0, "bmm": 0, "mv": 0, "_sparse_mm": 0, "addmm": 1, "addmv": 1, "baddbmm": 1, "_sparse_addmm": 1}


def _of_stored(one: torch.Tensor, other: torch.Tensor) -> int:
    """Product with a sparse matrix: each stored element is multiplied by a row or column of the other operand.

    Raises ValueError if both are sparse, because the count then depends on their indices.
    """
    if _is_sparse(one) and _is_sparse(other):
        raise ValueError("both operands are sparse")
    if _is_sparse(one):
        return _stored(one) * (other.shape[-1] if other.dim() > 1 else 1)
    return _stored(other) * one.shape[-2]


def _is_sparse(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout != torch.strided


def _stored(sparse: torch.Tensor) -> int:
    """Return the number of elements that a sparse tensor stores, including whole blocks."""
    return (sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()).numel()


def _batched(
    _added: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any
) -> int:
    """`addbmm`, (B, N, K) by (B, K, M): B*N*K*M, although the products are summed up."""
    return one.numel() * other.shape[-1]


def _grouped_mm(one: torch.Tensor, other: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """`torch.nn.functional.grouped_mm`: an operand with two dimensions is divided into groups along one axis.

    (T, K) by (G, K, N) multiplies each row by one matrix: T*K*N. (G, M, K) by (K, N) divides the columns: M*K*N.
    (M, K) by (K, N) divides K: M*K*N. (G, M, K) by (G, K, N) is a `bmm`: G*M*K*N.
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
    """`bilinear`, computed as its einsum `bi,oij,bj->bo`: the first two factors, then their product with the third."""
    rank = one.dim() + len(expand1)
    sizes = [_unsqueezed(t.shape, e, rank) for t, e in ((one, expand1), (two, expand2), (three, expand3))]
    both = [max(pair) for pair in zip(sizes[0], sizes[1], strict=True)]
    left = [1 if axis in sumdim and axis in expand3 else size for axis, size in enumerate(both)]
    return prod(both) + prod(max(pair) for pair in zip(left, sizes[2], strict=True))


def _unsqueezed(shape: Sequence[int], expanded: Sequence[int], rank: int) -> list[int]:
    rest = iter(shape)
    return [1 if axis in expanded else next(rest) for axis in range(rank)]


def _conv_tbc(_input: torch.Tensor, weight: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """Weight (kernel, channels in, channels out): kernel * channels in for each element of the output."""
    return _elements(out) * weight.shape[0] * weight.shape[1]


def _distances(one: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """`cdist`, `pdist`: one multiply-accumulate for each coordinate of each pair."""
    return _elements(out) * one.shape[-1]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any
) -> int:
    """Scores, and their product with the values: (..., L, E), (..., S, E), (..., S, V) need L*S*(E+V) for each head.

    The heads are those of the query; several may share keys and values. A causal mask does not reduce the count.
    """
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _mkldnn_rnn_layer(
    flows_in: torch.Tensor, into: torch.Tensor, recurrent: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any
) -> int:
    """One layer in one direction: both weight matrices for each step of each sequence."""
    return flows_in.numel() // flows_in.shape[-1] * (into.numel() + recurrent.numel())


def _packed_conv(_input: torch.Tensor, packed: Any, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """A quantized convolution, whose weights are packed."""
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
    """Counts the multiply-accumulates of everything that runs inside it. For passes without gradients.

    Attributes:
        total: the multiply-accumulates so far.
        uncounted: the names of the operators that multiply and have no formula, in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # imports Triton, so only when needed

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
        """Add the count of one operator. For an inner mode that got the output without calling the operator here."""
        formula, doubled = self._formula(func, args)
        name = func._schema.name
        self._add(name, formula, args, kwargs, out, doubled=doubled, multiplies=self._multiplies(name))

    def _multiplies(self, name: str) -> bool:
        library, _, own = name.partition("::")
        return library not in self._known_libraries or _sounds_like_a_product(own)

    def _has_formula(self, func: OpOverload, args: Any) -> bool:
        return self._formula(func, args)[0] is not None

    def _formula(self, func: OpOverload, args: Any) -> tuple[Formula | None, bool]:
        """Return the formula of an operator, and whether it counts a multiply-accumulate as 2, as torch's do."""
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
        """Return the formula of `addmm` for `addmm_`."""
        library, _, own = name.partition("::")
        if library != "aten" or not own.endswith("_") or own.endswith("__"):
            return None
        return self._registry.get(getattr(torch.ops.aten, own.removesuffix("_"), None))

    def _decomposed(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Run an operator as the operators that it consists of; in inference mode torch does not decompose it."""
        if func.namespace == "prim":  # queries of a tensor, which the dispatcher does not know
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
            # torch's formulas count a multiply-accumulate as 2, and call the output `out_val`.
            self.total += formula(*args, **kwargs, out_val=out) // 2 if doubled else formula(*args, **kwargs, out=out)
        except Exception:  # an overload with other arguments, or a size that depends on values
            self.uncounted[name] = None


@cache
def _sounds_like_a_product(own: str) -> bool:
    """Whether an operator of a known library multiplies, by its name without that of the library."""
    return _MULTIPLIES.search(own) is not None and _MULTIPLIES_NOT.search(own) is None

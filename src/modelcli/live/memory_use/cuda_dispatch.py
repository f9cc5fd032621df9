"""Let tensors without values take the operators that tensors on a CUDA device take.

PyTorch decides by the device of a tensor which kernel of attention runs, whether dropout keeps a mask of bytes, and
what autocast casts to which dtype. Tensors on the meta device take other ways there, with other memory. Fake tensors
that claim to be on a CUDA device take the right ones, but no backward pass runs on them where there is no GPU.

So modelcli registers kernels of its own under a dispatch key that no device uses, and which lies where that of autocast
lies: above autograd, so that calls from inside other operators are seen as well. They choose as PyTorch does for CUDA.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

_ATEN = torch.ops.aten

#: The key under which the kernels are registered: the autocast of a device that PyTorch has no kernels for.
_KEY_NAME = "AutocastIPU"
_KEY = torch._C._dispatch_key_parse(_KEY_NAME)

#: What autocast on CUDA runs in the lower precision: `AT_FORALL_LOWER_PRECISION_FP` in `aten/src/ATen/autocast_mode.h`.
LOWER = (
    *("_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d"),
    *("conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul"),
    *("einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot"),
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    *("_scaled_dot_product_flash_attention", "scaled_dot_product_attention"),
)

#: What it runs in float32: `AT_FORALL_FP32`.
FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh"),
    *("tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm"),
    *("rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity"),
    *("poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss"),
    *("soft_margin_loss", "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist"),
    *("pdist", "cdist", "renorm", "logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d"),
    *("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_nearest3d", "_upsample_nearest_exact3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_trilinear3d"),
    *("upsample_bicubic2d", "_upsample_bicubic2d_aa"),
)

#: What gives float32, without a copy of what it reads: `AT_FORALL_FP32_SET_OPT_DTYPE`.
FLOAT32_RESULT = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm"),
    *("linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"),
)

#: What runs in the widest dtype of its arguments: `AT_FORALL_PROMOTE`.
WIDEST = (
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot"),
    "scatter_add",
)

#: Half precisions, for which kernels differ.
_HALVES = (torch.float16, torch.bfloat16)


class CudaDispatch:
    """Runs operators as on a CUDA device, while it is entered, and as under autocast, while that is on.

    Args:
        dtype: the dtype that autocast casts to; None for no autocast.
        recomputes: whether a module runs again inside the backward pass. If it ran under autocast, it does so again.
    """

    def __init__(self, dtype: torch.dtype | None = None, recomputes: Callable[[], bool] = lambda: False) -> None:
        self._dtype = dtype
        self._recomputes = recomputes
        self._is_casting = False
        #: The casts of parameters, which autocast keeps until it ends.
        self._casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that autocast casts to now; None if it is off."""
        return self._dtype if self._is_casting or self._recomputes() else None

    def forget_casts(self) -> None:
        """Drop the casts of parameters, if autocast is off now."""
        if self._casts and self.autocast is None:
            self._casts.clear()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run operators in the block as on a CUDA device."""
        with contextlib.ExitStack() as stack:
            others = stack.enter_context(torch.library._scoped_library("_", "IMPL"))
            others.m.fallback_fallthrough(_KEY_NAME)  # for all operators that get no kernel here
            library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
            for name, kernel in self._kernels().items():
                library.impl(name, kernel, _KEY_NAME)
            was = torch._C._dispatch_tls_is_dispatch_key_excluded(_KEY_NAME)
            torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY_NAME, False)
            stack.callback(torch._C._dispatch_tls_set_dispatch_key_excluded, _KEY_NAME, was)
            stack.enter_context(torch._C._IncludeDispatchKeyGuard(_KEY))
            yield

    @contextlib.contextmanager
    def casting(self) -> Iterator[None]:
        """Turn autocast on in the block."""
        self._is_casting = True
        try:
            yield
        finally:
            self._is_casting = False
            self._casts.clear()

    def _kernels(self) -> dict[str, Callable[..., Any]]:
        """Return the kernels to register, by the names of operators and their overloads."""
        found: dict[str, Callable[..., Any]] = {}
        makers = (
            (LOWER, self._lower),
            (FLOAT32, self._float32),
            (FLOAT32_RESULT, self._result),
            (WIDEST, self._widest),
        )
        for names, make in makers:
            for name in names:
                if (operator := _operator(name)) is not None:
                    found[name] = _below(make(operator))
        found["dropout"] = _below(_dropout)
        found["softmax.int"] = _below(self._softmax(_ATEN.softmax.int, _ATEN._softmax.default))
        found["log_softmax.int"] = _below(self._softmax(_ATEN.log_softmax.int, _ATEN._log_softmax.default))
        found["scaled_dot_product_attention"] = _below(self._attention)
        if _operator("_fused_rms_norm") is not None:
            found["rms_norm"] = _below(self._rms_norm)
        return found

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Cast a floating-point tensor, or those in a list, as autocast does: see `cached_cast`."""
        if isinstance(value, list | tuple):
            return [self._cast(item, dtype) for item in value]
        if not _is_eligible(value) or value.dtype == dtype:
            return value
        if not (value.requires_grad and value.is_leaf and value.dtype == torch.float32) or value._is_view():
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value, value.to(dtype)
        return self._casts[id(value)][1]

    def _lower(self, operator: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if (dtype := self.autocast) is None:
                return operator(*args, **kwargs)
            return operator(*(self._cast(arg, dtype) for arg in args), **_each(kwargs, lambda v: self._cast(v, dtype)))

        return run

    def _float32(self, operator: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.autocast is None:
                return operator(*args, **kwargs)
            cast = functools.partial(self._cast, dtype=torch.float32)
            return operator(*map(cast, args), **_each(kwargs, cast))

        return run

    def _result(self, operator: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.autocast is not None and _is_eligible(args[0]) and _states_no_dtype(operator, args, kwargs):
                kwargs = {**kwargs, "dtype": torch.float32}
            return operator(*args, **kwargs)

        return run

    def _widest(self, operator: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.autocast is None:
                return operator(*args, **kwargs)
            floating = [arg.dtype for arg in args if _is_eligible(arg)]
            dtype = torch.float32 if torch.float32 in floating else self.autocast
            return operator(*(self._cast(arg, dtype) for arg in args), **kwargs)

        return run

    def _softmax(self, operator: Any, kernel: Any) -> Callable[..., Any]:
        """On CUDA the kernel reads float16 and writes float32; of other dtypes a copy in float32 is made first."""

        def run(read: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
            if dtype is None and self.autocast is not None and _is_eligible(read):
                dtype = torch.float32
            if read.dtype == torch.float16 and dtype == torch.float32:
                return kernel(read, dim, True)
            return operator(read, dim, dtype)

        return run

    def _rms_norm(
        self, read: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
    ) -> Any:
        if self.autocast is not None:
            read, weight = self._cast(read, torch.float32), self._cast(weight, torch.float32)
        return _FusedRmsNorm.apply(read, len(shape), weight)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Run the kernel of attention that PyTorch chooses on CUDA: flash, efficient, or the plain operators."""
        if self.autocast is not None:
            query, key, value = (self._cast(tensor, self.autocast) for tensor in (query, key, value))
            if attn_mask is not None and attn_mask.dtype.is_floating_point:
                attn_mask = self._cast(attn_mask, self.autocast)
        kernel = _kernel_of_attention(query, key, value, attn_mask, enable_gqa)
        if kernel == "flash":
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if kernel == "efficient":
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return _ATEN._scaled_dot_product_attention_math.default(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]


class _FusedRmsNorm(torch.autograd.Function):
    """What `_fused_rms_norm` of CUDA allocates and keeps: the output, and one number a row beside its input."""

    @staticmethod
    def forward(ctx: Any, read: torch.Tensor, dims: int, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(read, weight, read.new_empty(read.shape[:-dims], dtype=torch.float32))
        return torch.empty_like(read)

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> Any:
        read, weight, _ = ctx.saved_tensors
        return torch.empty_like(read), None, None if weight is None else torch.empty_like(weight)


def _below(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Let a kernel call other operators without being asked again, as those of autocast do."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
            return kernel(*args, **kwargs)

    return run


def _operator(name: str) -> Any:
    """Return an overload of an operator; None in a PyTorch that does not have it."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(_ATEN, packet, None), overload or "default", None)


def _each(values: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: function(value) for name, value in values.items()}


def _is_eligible(value: Any) -> bool:
    """Whether autocast casts a value: a floating-point tensor, but no float64."""
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dtype != torch.float64


def _states_no_dtype(operator: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in operator._schema.arguments]
    place = names.index("dtype")
    return kwargs.get("dtype") is None and (len(args) <= place or args[place] is None)


def _dropout(read: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """On CUDA dropout keeps a mask of bytes (`is_fused_kernel_acceptable` in `native/Dropout.cpp`)."""
    if train and 0 < p < 1 and read.numel() > 0:
        return _ATEN.native_dropout.default(read, p, train)[0]  # type: ignore[no-any-return]
    return _ATEN.dropout.default(read, p, train)  # type: ignore[no-any-return]


def _kernel_of_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, grouped: bool
) -> str:
    """Return the kernel that PyTorch chooses, as `select_sdp_backend` in `transformers/cuda/sdp_utils.cpp` does.

    The GPU is assumed to be of Ampere's generation or later, which flash attention needs.
    """
    tensors = (query, key, value)
    if any(tensor.dim() != 4 or 0 in tensor.shape for tensor in tensors):
        return "math"
    sizes = {tensor.shape[-1] for tensor in tensors}
    is_half = query.dtype in _HALVES
    if is_half and mask is None and len(sizes) == 1 and max(sizes) <= 256:
        return "flash"
    heads = {tensor.shape[1] for tensor in tensors}
    if grouped or len(heads) > 1 or query.dtype not in (*_HALVES, torch.float32):
        return "math"
    aligned = 8 if is_half else 4
    if query.shape[-1] % aligned or value.shape[-1] % aligned or (mask is not None and mask.requires_grad):
        return "math"
    return "efficient"


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, p: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    size = query.shape[-1]
    if size % 8:
        scale = size**-0.5 if scale is None else scale
        query, key, value = (functional.pad(tensor, (0, 8 - size % 8)) for tensor in (query, key, value))
    made = _ATEN._scaled_dot_product_flash_attention.default(query, key, value, p, is_causal, False, scale=scale)
    return made[0][..., :size] if size % 8 else made[0]  # type: ignore[no-any-return]


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
        length = mask.shape[-1]
        if length % 16:  # `pad_bias`: rows have to begin at multiples of 16 elements
            mask = functional.pad(mask, (0, 16 - length % 16))[..., :length]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    needs_sums = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return _ATEN._scaled_dot_product_efficient_attention.default(  # type: ignore[no-any-return]
        query, key, value, mask, needs_sums, p, is_causal, scale=scale
    )[0]

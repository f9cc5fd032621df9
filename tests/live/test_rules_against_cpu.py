"""The rules of a forward pass on meta compared with the CPU: what they accept runs there, what they refuse fails.

Every module of `torch.nn` and a set of operators called by hand, times shapes (right, of wrong sizes and ranks, empty,
without a batch), times dtypes of the input, times dtypes of the parameters: all in one, and each alone in another one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody writes it

from modelcli.live import trace
from modelcli.live.meta_models import meta_copy
from tests.needs import COMPLETE, torch_version
from tests.sampling import sampled

Make = Callable[[], nn.Module]

SHAPES: tuple[tuple[int, ...], ...] = (
    (4,),
    (0,),
    (2, 4),
    (0, 4),
    (2, 4, 8),
    (4, 8, 8),
    (0, 4, 8),
    (2, 4, 0),
    (2, 4, 8, 8),
    (2, 6, 8, 8),
    (0, 4, 8, 8),
    (2, 4, 8, 8, 8),
)
#: Fewer shapes for modules in which one parameter has another dtype than the rest.
FEWER_SHAPES = tuple(shape for shape in SHAPES if shape in {(2, 4), (2, 4, 8), (0, 4, 8), (4, 8, 8), (2, 4, 8, 8)})
DTYPES = (torch.float32, torch.int64)
RARE_DTYPES = (torch.bfloat16, torch.float64, torch.float16, torch.int32, torch.uint8, torch.bool, torch.complex64)


@dataclass(frozen=True)
class Left:
    """A known disagreement: where and in which direction, the error, and why it is accepted."""

    names: str
    forgives: bool
    raised: str
    why: str


LEFT = (
    Left("MaxUnpool.*|EmbeddingBag.*|F.embedding_bag", True, "out of|offset|[Ii]ndex|indices", "values: indices"),
    Left("index.*|gather.*|take.*|Embedding.*|scatter.*", True, "out of (bounds|range)", "values: indices"),
    Left("masked_scatter", True, "Number of elements", "values: how many elements a mask picks"),
    Left("F.embedding_bag", False, "expected indices to be long or int", "the meta kernel refuses bytes as indices"),
    Left(".*Conv.*|.*conv.*", False, "and bias type", "large ones run by oneDNN, small ones by a kernel that takes it"),
    Left("LSTM.*|GRU.*", False, "same dtype", "oneDNN takes biases of another dtype; a GPU does not"),
    Left(".*", False, "meta tensors|register_meta|no fake impl|Meta kernel", "the meta device cannot run it at all"),
    Left("take_along.*", True, "ZeroDivision", "a fault of PyTorch's own"),
)
#: Known disagreements of releases before COMPLETE, which accept empty inputs that later releases refuse.
LEFT_BY_OLDER = (
    Left("NLLLoss.*", False, "a target of one element", "an older CPU kernel does not look at an empty input"),
    Left("cummax", False, "an axis 1, but there are 1 axes", "an older CPU kernel does not look at an empty input"),
)


class Three(nn.Module):
    """A module that passes its input as each of the first arguments of another."""

    def __init__(self, inner: nn.Module, count: int = 3) -> None:
        super().__init__()
        self.inner = inner
        self.count = count

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(*[x] * self.count)


class Classified(nn.Module):
    """A loss with the first class as the target."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: torch.Tensor) -> Any:
        return self.loss(x, torch.zeros(x.shape[:1] + x.shape[2:], dtype=torch.int64, device=x.device))


class Unpooled(nn.Module):
    """A pooling layer and its inverse."""

    def __init__(self, dims: str) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{dims}")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{dims}")(2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.unpool(*self.pool(x))


class Calls(nn.Module):
    """A class that calls an operator itself, with parameters (`w`, `b`) and buffers (other names) of these shapes."""

    def __init__(self, call: Callable[[Any, torch.Tensor], Any], **shapes: tuple[int, ...] | torch.Tensor) -> None:
        super().__init__()
        self.call = call
        for name, shape in shapes.items():
            tensor = shape if isinstance(shape, torch.Tensor) else torch.ones(shape)
            if name in ("w", "b"):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def _modules() -> Iterator[tuple[str, Make]]:
    plain = (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 RReLU SELU SiLU "
        "Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink GLU PReLU Softmax2d Softmax Softmin LogSoftmax Identity "
        "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Flatten"
    )
    for name in plain.split():
        yield name, getattr(nn, name)
    for text in (  # noqa: SIM905
        "Linear(4,3) Linear(4,3,bias=False) Bilinear(4,4,3) Threshold(0.1,20) ReLU(inplace=True) GELU('tanh') GLU(1) "
        "PReLU(4) Softmax(2) Softmax(-1) Softmin(1) LogSoftmax(-2) Flatten(2) Flatten(0,2) Unflatten(1,(2,2)) "
        "Conv2d(4,6,3,groups=2) Conv2d(4,4,3,groups=4,padding=1,stride=2) Conv2d(4,6,9) Conv2d(4,6,3,padding='same') "
        "Conv2d(4,6,3,padding=1,padding_mode='reflect') Conv2d(4,6,3,dilation=4) Conv2d(4,6,1,bias=False) "
        "ConvTranspose2d(4,6,3,groups=2,stride=2,output_padding=1,bias=False) ConvTranspose2d(4,6,3,output_padding=1) "
        "BatchNorm2d(4,affine=False) BatchNorm2d(4,track_running_stats=False) SyncBatchNorm(4) "
        "InstanceNorm2d(4) InstanceNorm2d(4,track_running_stats=True) GroupNorm(2,4) GroupNorm(2,4,affine=False) "
        "LayerNorm(8) LayerNorm([8,8]) LayerNorm(8,elementwise_affine=False) LayerNorm(8,bias=False) RMSNorm(8) "
        "LocalResponseNorm(2) CrossMapLRN2d(2) Embedding(10,3) Embedding(10,3,padding_idx=1) EmbeddingBag(10,3) "
        "EmbeddingBag(10,3,mode='sum') LSTM(4,3) LSTM(4,3,2,bidirectional=True,batch_first=True) LSTM(4,3,proj_size=2) "
        "GRU(8,3,batch_first=True) RNN(4,3) RNN(4,3,nonlinearity='relu') LSTMCell(4,3) GRUCell(4,3) RNNCell(4,3) "
        "PixelShuffle(2) PixelUnshuffle(2) PixelUnshuffle(3) ChannelShuffle(2) Fold((4,4),2) Unfold(2) Unfold(9) "
        "Upsample(scale_factor=2) Upsample(scale_factor=2,mode='bilinear') Upsample(size=5,mode='linear') "
        "Upsample(size=3,mode='trilinear') Upsample(size=(4,4),mode='bicubic') Upsample(size=3,mode='area') "
        "UpsamplingNearest2d(scale_factor=2) UpsamplingBilinear2d(size=3) Upsample(size=3,mode='nearest-exact') "
        "FractionalMaxPool2d(2,output_size=3) FractionalMaxPool3d(2,output_size=3) "
        "TransformerEncoderLayer(8,2,16) TransformerEncoderLayer(8,2,16,batch_first=True,norm_first=True)"
    ).split():
        yield text, lambda text=text: eval(f"nn.{text}", {"nn": nn})  # type: ignore[misc]
    for dims in ("1d", "2d", "3d"):
        for name, *given in (
            ("Conv", 4, 6, 3),
            ("ConvTranspose", 4, 6, 3),
            ("BatchNorm", 4),
            ("InstanceNorm", 4, 1e-5, 0.1, True),
            ("MaxPool", 2),
            ("MaxPool", 9),
            ("MaxPool", 3, 1, 1, 2),
            ("AvgPool", 2),
            ("LPPool", 2, 2),
            ("AdaptiveAvgPool", 1),
            ("AdaptiveAvgPool", 2),
            ("AdaptiveMaxPool", 1),
            ("AdaptiveMaxPool", 2),
            ("ReflectionPad", 1),
            ("ReplicationPad", 1),
            ("ZeroPad", 1),
            ("CircularPad", 1),
            ("ConstantPad", 1, 3.0),
        ):
            kind = getattr(nn, f"{name}{dims}")
            yield f"{name}{dims}{tuple(given)}", lambda kind=kind, given=given: kind(*given)  # type: ignore[misc]
        yield f"MaxUnpool{dims}", lambda dims=dims: Unpooled(dims)  # type: ignore[misc]
    for name in (  # noqa: SIM905
        "L1Loss MSELoss SmoothL1Loss HuberLoss BCELoss BCEWithLogitsLoss KLDivLoss PoissonNLLLoss SoftMarginLoss "
        "MultiLabelMarginLoss MultiLabelSoftMarginLoss HingeEmbeddingLoss CosineSimilarity PairwiseDistance"
    ).split():
        yield name, lambda name=name: Three(getattr(nn, name)(), 2)  # type: ignore[misc]
    for name in ("GaussianNLLLoss", "TripletMarginLoss", "TripletMarginWithDistanceLoss", "MarginRankingLoss"):
        yield name, lambda name=name: Three(getattr(nn, name)())  # type: ignore[misc]
    for name in ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss", "CosineEmbeddingLoss"):
        count = 3 if name == "CosineEmbeddingLoss" else 2
        yield name, lambda name=name, count=count: Three(getattr(nn, name)(), count)  # type: ignore[misc]
    for name in ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss"):
        yield f"{name} of classes", lambda name=name: Classified(getattr(nn, name)())  # type: ignore[misc]
    yield "CrossEntropyLoss of weights", lambda: Classified(nn.CrossEntropyLoss(weight=torch.ones(4)))
    yield "AdaptiveLogSoftmaxWithLoss", lambda: Classified(nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]))
    yield "MultiheadAttention", lambda: Three(nn.MultiheadAttention(8, 2))
    yield "MultiheadAttention of others", lambda: Three(nn.MultiheadAttention(8, 2, kdim=8, vdim=6, batch_first=True))
    yield "TransformerEncoder", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)
    yield "TransformerDecoderLayer", lambda: Three(nn.TransformerDecoderLayer(8, 2, 16), 2)
    yield (
        "TransformerDecoder",
        lambda: Three(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1), 2),
    )
    yield "Transformer", lambda: Three(nn.Transformer(8, 2, 1, 1, 16), 2)


MODULES = dict(_modules())

ONE = torch.zeros(2, dtype=torch.int64)
MASK = torch.ones(8, dtype=torch.bool)

BY_HAND: dict[str, Make] = {
    "mm": lambda: Calls(lambda m, x: torch.mm(x, m.w), w=(4, 3)),
    "addmm": lambda: Calls(lambda m, x: torch.addmm(m.b, x, m.w), w=(4, 3), b=(3,)),
    "bmm": lambda: Calls(lambda m, x: torch.bmm(x, m.w), w=(2, 8, 3)),
    "baddbmm": lambda: Calls(lambda m, x: torch.baddbmm(m.b, x, m.w), w=(2, 8, 3), b=(1, 1, 3)),
    "addbmm": lambda: Calls(lambda m, x: torch.addbmm(m.b, x, m.w), w=(2, 8, 3), b=(4, 3)),
    "mv": lambda: Calls(lambda m, x: torch.mv(x, m.w), w=(4,)),
    "addmv": lambda: Calls(lambda m, x: torch.addmv(m.b, x, m.w), w=(4,), b=(2,)),
    "outer": lambda: Calls(lambda m, x: torch.outer(x, m.w), w=(4,)),
    "dot": lambda: Calls(lambda m, x: torch.dot(x, m.w), w=(4,)),
    "matmul": lambda: Calls(lambda m, x: x @ m.w, w=(8, 3)),
    "matmul by a vector": lambda: Calls(lambda m, x: x @ m.w, w=(8,)),
    "einsum": lambda: Calls(lambda m, x: torch.einsum("...c,cd->...d", x, m.w), w=(8, 3)),
    "tensordot": lambda: Calls(lambda m, x: torch.tensordot(x, m.w, 1), w=(8, 3)),
    "F.linear": lambda: Calls(lambda m, x: F.linear(x, m.w, m.b), w=(3, 4), b=(3,)),
    "F.bilinear": lambda: Calls(lambda m, x: F.bilinear(x, x, m.w, m.b), w=(3, 4, 4), b=(3,)),
    "F.batch_norm": lambda: Calls(
        lambda m, x: F.batch_norm(x, m.mean, m.var, m.w, m.b), mean=(4,), var=(4,), w=(4,), b=(4,)
    ),
    "F.batch_norm in training": lambda: Calls(
        lambda m, x: F.batch_norm(x, m.mean, m.var, m.w, m.b, training=True), mean=(4,), var=(4,), w=(4,), b=(4,)
    ),
    "F.batch_norm of wrong sizes": lambda: Calls(
        lambda m, x: F.batch_norm(x, m.mean, m.var, m.w, m.b), mean=(4,), var=(6,), w=(4,), b=(4,)
    ),
    "F.layer_norm": lambda: Calls(lambda m, x: F.layer_norm(x, (8,), m.w, m.b), w=(8,), b=(8,)),
    "F.layer_norm of wrong sizes": lambda: Calls(lambda m, x: F.layer_norm(x, (8,), m.w, m.b), w=(8,), b=(6,)),
    "F.group_norm": lambda: Calls(lambda m, x: F.group_norm(x, 2, m.w, m.b), w=(4,), b=(4,)),
    "F.rms_norm": lambda: Calls(lambda m, x: F.rms_norm(x, (8,), m.w), w=(8,)),
    "F.conv1d": lambda: Calls(lambda m, x: F.conv1d(x, m.w, m.b), w=(6, 4, 3), b=(6,)),
    "F.conv2d": lambda: Calls(lambda m, x: F.conv2d(x, m.w, m.b), w=(6, 4, 3, 3), b=(6,)),
    "F.conv2d of a wrong bias": lambda: Calls(lambda m, x: F.conv2d(x, m.w, m.b), w=(6, 4, 3, 3), b=(5,)),
    "F.conv2d in wrong groups": lambda: Calls(lambda m, x: F.conv2d(x, m.w, groups=4), w=(6, 1, 3, 3)),
    "F.conv2d of negative padding": lambda: Calls(lambda m, x: F.conv2d(x, m.w, padding=-1), w=(6, 4, 3, 3)),
    "F.conv_transpose2d": lambda: Calls(lambda m, x: F.conv_transpose2d(x, m.w, m.b), w=(4, 6, 3, 3), b=(5,)),
    "F.conv_transpose2d padded": lambda: Calls(
        lambda m, x: F.conv_transpose2d(x, m.w, output_padding=2, stride=2), w=(4, 6, 3, 3)
    ),
    "conv_tbc": lambda: Calls(lambda m, x: torch.conv_tbc(x, m.w, m.b), w=(3, 8, 5), b=(5,)),
    "F.embedding": lambda: Calls(lambda m, x: F.embedding(x, m.w), w=(10, 3)),
    "F.embedding_bag": lambda: Calls(lambda m, x: F.embedding_bag(x, m.w, torch.tensor([0, 1])), w=(10, 3)),
    "index": lambda: Calls(lambda m, x: m.w[x], w=(10, 3)),
    "index by a buffer": lambda: Calls(lambda m, x: x[m.i], i=ONE),
    "index_select": lambda: Calls(lambda m, x: torch.index_select(m.w, 0, x), w=(10, 3)),
    "index_select by a buffer": lambda: Calls(lambda m, x: torch.index_select(x, 0, m.i), i=torch.zeros(2)),
    "gather": lambda: Calls(lambda m, x: torch.gather(x, 0, m.i), i=torch.zeros(2, 4, dtype=torch.int64)),
    "scatter_add": lambda: Calls(
        lambda m, x: torch.zeros(4, 8, device=x.device).scatter_add(0, m.i, x), i=torch.zeros(2, 4, dtype=torch.int64)
    ),
    "index_add": lambda: Calls(lambda m, x: torch.zeros(4, 8, device=x.device).index_add(0, m.i, x), i=ONE),
    "index_put": lambda: Calls(lambda m, x: torch.zeros(4, 8, device=x.device).index_put((m.i,), x), i=ONE),
    "index_fill": lambda: Calls(lambda m, x: x.index_fill(0, m.i, 1.0), i=torch.zeros(1, dtype=torch.int32)),
    "masked_fill": lambda: Calls(lambda m, x: x.masked_fill(m.i, 1.0), i=MASK),
    "masked_fill by numbers": lambda: Calls(lambda m, x: x.masked_fill(m.i, 1.0), i=(8,)),
    "where": lambda: Calls(lambda m, x: torch.where(m.i, x, m.w), w=(8,), i=MASK),
    "where by numbers": lambda: Calls(lambda m, x: torch.where(m.i, x, m.w), w=(8,), i=(8,)),
    "where by bytes": lambda: Calls(lambda m, x: torch.where(m.i, x, m.w), w=(8,), i=MASK.to(torch.uint8)),
    "cat": lambda: Calls(lambda m, x: torch.cat([x, m.w]), w=(2, 4)),
    "stack": lambda: Calls(lambda m, x: torch.stack([x, m.w]), w=(2, 4)),
    "add": lambda: Calls(lambda m, x: x + m.w, w=(8,)),
    "add_": lambda: Calls(lambda m, x: m.w.clone().add_(x), w=(8,)),
    "lerp": lambda: Calls(lambda m, x: torch.lerp(x, m.w, 0.5), w=(8,)),
    "addcmul": lambda: Calls(lambda m, x: torch.addcmul(x, m.w, m.w), w=(8,)),
    "pow": lambda: Calls(lambda m, x: torch.pow(x, m.w), w=(8,)),
    "floor_divide": lambda: Calls(lambda m, x: x // 2),
    "bitwise_and": lambda: Calls(lambda m, x: x & 1),
    "exp": lambda: Calls(lambda m, x: x.exp()),
    "rsqrt": lambda: Calls(lambda m, x: x.rsqrt()),
    "neg": lambda: Calls(lambda m, x: -x),
    "mean": lambda: Calls(lambda m, x: x.mean(-1)),
    "var": lambda: Calls(lambda m, x: x.var(-1)),
    "norm": lambda: Calls(lambda m, x: x.norm()),
    "max": lambda: Calls(lambda m, x: x.max(-1)),
    "argmax": lambda: Calls(lambda m, x: x.argmax(1)),
    "topk": lambda: Calls(lambda m, x: x.topk(2)),
    "median": lambda: Calls(lambda m, x: x.median(-1)),
    "cumsum": lambda: Calls(lambda m, x: x.cumsum(1)),
    "cummax": lambda: Calls(lambda m, x: x.cummax(1)),
    "softmax": lambda: Calls(lambda m, x: x.softmax(-1)),
    "softmax over axis 9": lambda: Calls(lambda m, x: x.softmax(9)),
    "log_softmax": lambda: Calls(lambda m, x: F.log_softmax(x, 1)),
    "attention": lambda: Calls(lambda m, x: F.scaled_dot_product_attention(x, m.w, m.w), w=(2, 4, 8)),
    "attention under a mask": lambda: Calls(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.w), w=(8, 8)
    ),
    "cdist": lambda: Calls(lambda m, x: torch.cdist(x, m.w), w=(3, 8)),
    "cross": lambda: Calls(lambda m, x: torch.linalg.cross(x, m.w), w=(3,)),
    "grid_sample": lambda: Calls(lambda m, x: F.grid_sample(x, m.grid), grid=(2, 3, 3, 2)),
    "interpolate": lambda: Calls(lambda m, x: F.interpolate(x, scale_factor=0.5, mode="bilinear")),
    "interpolate smoothly": lambda: Calls(lambda m, x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True)),
    "pad": lambda: Calls(lambda m, x: F.pad(x, (1, 1), mode="reflect")),
    "bernoulli": lambda: Calls(lambda m, x: torch.bernoulli(x)),
    "gelu": lambda: Calls(lambda m, x: F.gelu(x)),
    "prelu": lambda: Calls(lambda m, x: F.prelu(x, m.w), w=(4,)),
    "complex": lambda: Calls(lambda m, x: torch.complex(x, m.w), w=(8,)),
    "searchsorted": lambda: Calls(lambda m, x: torch.searchsorted(m.w, x), w=(4,)),
    "lstm_cell": lambda: Calls(
        lambda m, x: torch.lstm_cell(x, (torch.zeros(2, 3, device=x.device),) * 2, m.w, m.b), w=(12, 4), b=(12, 3)
    ),
    "a cast by hand": lambda: Calls(lambda m, x: x.type_as(m.w) @ m.w, w=(8, 3)),
    "out=": lambda: Calls(lambda m, x: torch.mm(x, m.w, out=torch.empty(2, 3, device=x.device)), w=(4, 3)),
}

#: Classes of torch.nn that cannot run by themselves, are aliases of others, or (CTCLoss) depend on the values of all
#: their inputs.
NOT_RUN = {
    "Module", "Container", "Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict",
    "RNNBase", "RNNCellBase", "NLLLoss2d", "CTCLoss", "DataParallel", "LinearCrossEntropyLoss",
}  # fmt: skip


def test_every_module_of_torch_nn_is_held_against_the_cpu() -> None:
    """Lazy modules become modules that are compared."""
    there = {name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    held = {re.split(r"[( ]", name)[0] for name in MODULES}
    assert {name for name in there if not name.startswith("Lazy")} - NOT_RUN - held == set()


def variants(make: Make) -> Iterator[tuple[str, Make, tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]]:
    """A module in float32, in bfloat16, and with each of its tensors alone in bfloat16."""
    yield "float32", make, SHAPES, DTYPES
    yield "float32", make, FEWER_SHAPES, RARE_DTYPES
    names = [name for name, tensor in _tensors(make()) if tensor.is_floating_point()]
    if names:
        yield "bfloat16", lambda: _cast(make(), names), FEWER_SHAPES, (*DTYPES, torch.bfloat16)
    if 1 < len(names) <= 8:
        for name in names:
            yield f"{name} in bfloat16", partial(_cast_one, make, name), FEWER_SHAPES, (torch.float32, torch.bfloat16)


def _cast_one(make: Make, name: str) -> nn.Module:
    return _cast(make(), [name])


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _cast(module: nn.Module, names: list[str]) -> nn.Module:
    for name, tensor in _tensors(module):
        if name in names:
            tensor.data = tensor.data.to(torch.bfloat16)
    return module


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    """Attention calls its submodules, as in a forward pass of modelcli's: the fused kernel forgives an empty batch any
    dtype. One thread is faster for so small tensors."""
    count, fused = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.backends.mha.set_fastpath_enabled(fused)
    torch.set_num_threads(count)


@pytest.mark.parametrize("name", sampled([*MODULES, *BY_HAND], one_in=2))
def test_what_passes_runs_and_what_is_refused_fails(name: str) -> None:
    wrong: list[str] = []
    cases = 0
    for own, make, shapes, dtypes in variants((MODULES | BY_HAND)[name]):
        real, twin = make().eval(), meta_copy(make(), plain_tensors=True)
        for shape in shapes:
            for dtype in dtypes:
                cases += 1
                said = _disagreement(name, real, twin, shape, dtype)
                if said is not None:
                    wrong.append(f"{own}, {list(shape)} {dtype}: {said}")
    assert cases > 50
    assert not wrong, "\n".join(wrong)


def _disagreement(
    name: str, real: nn.Module, twin: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    """Return how the rules differ from the CPU for one input; None if they agree."""
    error: Exception | None = None
    try:
        with torch.no_grad():
            real(torch.zeros(shape, dtype=dtype))
    except Exception as raised:
        error = raised
    seen = trace.run(twin, [torch.zeros(shape, dtype=dtype, device="meta")])
    assert seen.rules is not None
    if (error is None) == (seen.failure is None):
        return None
    if error is not None and seen.rules.unchecked:
        # The check said that the CPU has no kernel for an operator, and not that the module runs.
        return None if re.search("not implemented for|Unsupported dtype", str(error)) else f"passes: {error}"
    cause = error if seen.failure is None else seen.failure.error
    text = str(cause)
    for left in LEFT if torch_version() >= COMPLETE else (*LEFT, *LEFT_BY_OLDER):
        if left.forgives == (error is not None) and re.fullmatch(left.names, name) and re.search(left.raised, text):
            return None
    return f"{'passes' if error is not None else 'is refused'}: {text.splitlines()[0][:200] if text else cause!r}"

"""Forward passes: what the meta device cannot run, what is counted, and what is reported.

The reference is plain PyTorch on the CPU, multiply-accumulates computed by hand, and torchinfo where it is right.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchinfo
from torch import nn

from modelcli.language import input_texts
from modelcli.language.references import Source
from modelcli.live.inputs import Inputs
from modelcli.live.mult_adds import MultAdds
from modelcli.live.opening import open_live
from modelcli.live.planning import traced
from modelcli.live.trace import shape_of, trace
from modelcli.model.blueprint import Trace
from tests.conftest import Cli
from tests.needs import each, needs_torch

HEAD = "from __future__ import annotations\nimport torch\nfrom torch import nn\nimport torch.nn.functional as F\n"


def written(folder: Path, code: str, name: str = "own.py") -> str:
    """Write a Python file of classes. Returns its name."""
    (folder / name).write_text(HEAD + code)
    return name


def seen(reference: str, *sizes: tuple[int, ...], dtype: tuple[str, ...] = ()) -> Trace:
    """Return the trace of the forward pass that `summary` makes."""
    live = open_live(Source(reference, input_size=sizes or None, input_dtype=dtype))
    found = traced(live, with_values=True).trace
    assert found is not None
    return found


# --- multiply-accumulates ---------------------------------------------------------------------------------------------


def counted(call: Callable[[], Any], device: str) -> MultAdds:
    counter = MultAdds()
    with warnings.catch_warnings(), torch.no_grad(), torch.device(device), counter:
        warnings.simplefilter("ignore")
        call()
    return counter


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def in_inference_mode() -> None:
    with torch.inference_mode():
        nn.Linear(4, 5)(zeros(2, 4))
        F.bilinear(zeros(2, 20), zeros(2, 30), zeros(40, 20, 30))


def deformed() -> None:
    from torchvision.ops import deform_conv2d

    deform_conv2d(zeros(2, 4, 10, 10), zeros(2, 18, 10, 10), zeros(16, 4, 3, 3), padding=1)


def grouped_by(one: torch.Tensor, other: torch.Tensor, ends: list[int]) -> Callable[[], Any]:
    return lambda: torch._grouped_mm(one, other, offs=torch.tensor(ends, dtype=torch.int32))


BF16 = torch.bfloat16
BY_HAND: dict[str, tuple[Callable[[], Any], int]] = {
    "bilinear": (lambda: F.bilinear(zeros(2, 20), zeros(2, 30), zeros(40, 20, 30)), 2 * 40 * 20 * 30 + 2 * 40 * 30),
    "Bilinear": (lambda: nn.Bilinear(20, 30, 40)(zeros(2, 20), zeros(2, 30)), 50_400),
    "matrix by vector": (lambda: zeros(64, 784) @ zeros(784), 50_176),
    "vector by matrix": (lambda: zeros(64) @ zeros(64, 784), 50_176),
    "vector by vector": (lambda: zeros(784) @ zeros(784), 784),
    "deform_conv2d": (deformed, 115_200),
    "_int_mm": (lambda: torch._int_mm(zeros(32, 16, dtype=torch.int8), zeros(16, 8, dtype=torch.int8)), 32 * 16 * 8),
    "conv_tbc": (lambda: torch.conv_tbc(zeros(10, 2, 4), zeros(3, 4, 5), zeros(5)), 8 * 2 * 5 * 3 * 4),
    "addbmm": (lambda: torch.addbmm(zeros(3, 5), zeros(10, 3, 4), zeros(10, 4, 5)), 10 * 3 * 4 * 5),
    "baddbmm": (lambda: torch.baddbmm(zeros(10, 3, 5), zeros(10, 3, 4), zeros(10, 4, 5)), 10 * 3 * 4 * 5),
    "addmv": (lambda: torch.addmv(zeros(3), zeros(3, 4), zeros(4)), 12),
    "addr": (lambda: torch.addr(zeros(3, 4), zeros(3), zeros(4)), 12),
    "addmm_": (lambda: zeros(3, 5).addmm_(zeros(3, 4), zeros(4, 5)), 60),
    "cdist": (lambda: torch.cdist(zeros(2, 5, 7), zeros(2, 6, 7)), 2 * 5 * 6 * 7),
    "cdist by a product": (lambda: torch.cdist(zeros(30, 7), zeros(30, 7)), 30 * 30 * 7),
    "pdist": (lambda: F.pdist(zeros(5, 7)), 10 * 7),
    "experts": (lambda: grouped_by(zeros(16, 32, dtype=BF16), zeros(4, 32, 32, dtype=BF16), [4, 8, 12, 16])(), 16_384),
    "experts by column": (
        lambda: grouped_by(zeros(2, 8, 16, dtype=BF16), zeros(16, 32, dtype=BF16), [16, 32])(),
        4_096,
    ),
    "two batches": (lambda: torch._grouped_mm(zeros(2, 8, 16, dtype=BF16), zeros(2, 16, 8, dtype=BF16)), 2_048),
    "LSTM": (lambda: nn.LSTM(4, 6)(zeros(5, 3, 4)), 5 * 3 * 24 * (4 + 6)),
    "LSTM in two directions": (
        lambda: nn.LSTM(4, 6, 2, bidirectional=True)(zeros(5, 3, 4)),
        2 * 5 * 3 * 24 * (4 + 6) + 2 * 5 * 3 * 24 * (12 + 6),
    ),
    "LSTM that projects": (lambda: nn.LSTM(4, 6, proj_size=3)(zeros(5, 3, 4)), 5 * 3 * (24 * (4 + 3) + 6 * 3)),
    "GRU": (lambda: nn.GRU(4, 6)(zeros(5, 3, 4)), 5 * 3 * 18 * (4 + 6)),
    "RNN": (lambda: nn.RNN(4, 6)(zeros(5, 3, 4)), 5 * 3 * 6 * (4 + 6)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 6)(zeros(3, 4)), 3 * 24 * (4 + 6)),
    "attention": (
        lambda: F.scaled_dot_product_attention(zeros(1, 2, 5, 8), zeros(1, 2, 7, 8), zeros(1, 2, 7, 8)),
        2 * 5 * 7 * (8 + 8),
    ),
    "attention with a mask": (
        lambda: F.scaled_dot_product_attention(
            zeros(1, 2, 5, 8), zeros(1, 2, 7, 8), zeros(1, 2, 7, 8), attn_mask=zeros(5, 7)
        ),
        2 * 5 * 7 * (8 + 8),
    ),
    "attention that shares keys": (
        lambda: F.scaled_dot_product_attention(
            zeros(1, 4, 5, 8), zeros(1, 2, 7, 8), zeros(1, 2, 7, 8), enable_gqa=True
        ),
        4 * 5 * 7 * (8 + 8),
    ),
    "einsum": (lambda: torch.einsum("bij,bjk->bik", zeros(2, 3, 4), zeros(2, 4, 5)), 120),
    "tensordot": (lambda: torch.tensordot(zeros(2, 3, 4), zeros(4, 5), 1), 120),
    "inference mode": (in_inference_mode, 40 + 50_400),
    "elementwise": (lambda: F.layer_norm(torch.outer(zeros(3), zeros(4)) * 2, (4,)).cumsum(0), 0),
}


GROUPED = ("experts", "experts by column", "two batches")


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", each(BY_HAND, dict.fromkeys(GROUPED, "_grouped_mm")))
def test_mult_adds_by_hand(name: str, device: str) -> None:
    """The CPU, which has other kernels, and the meta device give the same counts."""
    call, macs = BY_HAND[name]
    counter = counted(call, device)
    assert counter.total == macs
    assert not counter.uncounted


def test_spectral_norm_counts_its_products() -> None:
    def normed() -> None:
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)).eval()(zeros(2, 8))

    # Sigma is u times W times v; then the layer itself. The constructor's own iterations are added.
    assert counted(normed, "meta").total >= 4 * 8 + 4 + 2 * 4 * 8


UNKNOWN: dict[str, Callable[[], Any]] = {
    "aten::linalg_matrix_exp": lambda: torch.matrix_exp(zeros(4, 4)),
    "aten::linalg_inv_ex": lambda: torch.linalg.inv(torch.eye(4)),
    "aten::_fft_r2c": lambda: torch.fft.rfft(zeros(16)),
    "aten::_linalg_svd": lambda: torch.linalg.svd(zeros(4, 4)),
    "aten::cholesky_solve": lambda: torch.cholesky_solve(zeros(4, 2), torch.eye(4)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operator_that_multiplies_is_named(name: str) -> None:
    assert name in counted(UNKNOWN[name], "cpu").uncounted


def test_an_operator_of_another_library_is_named() -> None:
    @torch.library.custom_op("modelcli_tests::squared", mutates_args=())
    def squared(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    squared.register_fake(torch.empty_like)
    assert list(counted(lambda: squared(zeros(3, 3)), "meta").uncounted) == ["modelcli_tests::squared"]


def test_every_operator_that_multiplies_is_counted_or_named() -> None:
    """This searches ATen's operators by name for products, convolutions, attention and recurrent layers."""
    _multiplies = MultAdds()._multiplies

    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")}
    for word in ("mm", "mv", "convolution", "attention", "lstm", "linear", "matmul", "linalg_qr", "_fft_c2c"):
        assert any(_multiplies(name) for name in names if word in name), word
    for name in ("add.Tensor", "mul", "layer_norm", "upsample_bilinear2d", "embedding", "lgamma", "convert", "addcmul"):
        assert not _multiplies(f"aten::{name}"), name


def test_a_lower_bound_is_marked_as_such(cli: Cli, folder: Path) -> None:
    written(
        folder,
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.a = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return torch.fft.rfft(self.a(x)).real\n",
    )
    result = cli("summary", "own.py:Net", "--input-size", "1,4", "-f", "table")
    assert "at least 16" in result.out
    assert "lower bound" in result.err
    assert "aten::_fft_r2c" in result.err
    assert cli("summary", "own.py:Net", "--input-size", "1,4", "--json").json["uncounted"] == ["aten::_fft_r2c"]


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "mobilenet_v3_small", "densenet121", "squeezenet1_1"])
def test_sizes_equal_torchinfo(name: str) -> None:
    live = open_live(Source(name))
    peer = torchinfo.summary(live.module, input_size=(1, 3, 224, 224), device="meta", verbose=0)
    assert seen(name).forward_backward_bytes == peer.total_output_bytes


def test_attention_has_a_size(cli: Cli) -> None:
    """For vit_b_16, torchinfo leaves out 12 outputs of 197 x 768 elements, each with its gradient: 14.5 MB."""
    attention = seen("MultiheadAttention(8,2)", (5, 1, 8), (5, 1, 8), (5, 1, 8))
    assert attention.forward_backward_bytes == 2 * 4 * (5 * 8 + 5 * 5)  # the output, and the weights of attention
    live = open_live(Source("vit_b_16"))
    peer = torchinfo.summary(live.module, input_size=(1, 3, 224, 224), device="meta", verbose=0)
    assert seen("vit_b_16").forward_backward_bytes == peer.total_output_bytes + 12 * 197 * 768 * 4 * 2


# --- what runs on the CPU and not on the meta device -----------------------------------------------------------------

INIT = "    def __init__(self):\n        super().__init__()\n"

DECIDE: dict[str, tuple[str, tuple[int, ...]]] = {
    "a mask": (
        "class Net(nn.Module):\n" + INIT + "        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)\n"
        "        self.body = nn.TransformerEncoder(layer, 2)\n    def forward(self, x):\n"
        "        mask = torch.zeros(x.shape[0], x.shape[1], dtype=torch.bool)\n        mask[:, -1] = True\n"
        "        return self.body(x, src_key_padding_mask=mask)\n",
        (2, 5, 8),
    ),
    "a causal mask": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)\n"
        "    def forward(self, x):\n        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])\n"
        "        return self.body(x, x, tgt_mask=mask)\n",
        (2, 5, 8),
    ),
    "a state moved to a device": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.LSTM(8, 4, batch_first=True)\n"
        "        self.device = torch.device('cpu')\n    def forward(self, x):\n"
        "        h = torch.zeros(1, x.shape[0], 4).to(self.device)\n        return self.body(x, (h, h))[0]\n",
        (2, 5, 8),
    ),
    "item": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 4)\n    def forward(self, x):\n"
        "        return self.body(x) * (1 if x.abs().max().item() > 0 else 2)\n",
        (2, 8),
    ),
    "packed sequences": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.GRU(8, 4, batch_first=True)\n"
        "    def forward(self, x):\n        lengths = (x.abs().sum(2) > 0).sum(1).cpu()\n"
        "        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)\n"
        "        return nn.utils.rnn.pad_packed_sequence(self.body(packed)[0], batch_first=True)[0]\n",
        (2, 5, 8),
    ),
    "a distribution": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 4)\n    def forward(self, x):\n"
        "        return torch.distributions.Categorical(logits=self.body(x)).sample()\n",
        (2, 8),
    ),
    "experts": (
        "class Net(nn.Module):\n" + INIT + "        self.gate = nn.Linear(8, 4)\n"
        "        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))\n    def forward(self, x):\n"
        "        top, out = self.gate(x).argmax(1), torch.zeros_like(x)\n"
        "        for index, expert in enumerate(self.experts):\n            rows = torch.where(top == index)[0]\n"
        "            if len(rows):\n                out[rows] = expert(x[rows])\n        return out\n",
        (16, 8),
    ),
    "unique": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 4)\n    def forward(self, x):\n"
        "        return self.body(torch.unique(x, dim=0))\n",
        (3, 8),
    ),
    "non-maximum suppression": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 4)\n    def forward(self, x):\n"
        "        from torchvision.ops import nms\n        boxes = self.body(x).abs()\n"
        "        return boxes[nms(boxes, boxes[:, 0], 1.0)]\n",
        (3, 8),
    ),
    "NumPy": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 4)\n    def forward(self, x):\n"
        "        return self.body(torch.from_numpy(x.numpy() * 2))\n",
        (3, 8),
    ),
    "autocast": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 4)\n    def forward(self, x):\n"
        "        with torch.autocast(x.device.type, dtype=torch.bfloat16):\n            return self.body(x)\n",
        (3, 8),
    ),
    "gradients": (
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 1)\n    def forward(self, x):\n"
        "        with torch.enable_grad():\n            x = x.detach().requires_grad_()\n"
        "            return torch.autograd.grad(self.body(x).sum(), x)[0]\n",
        (3, 8),
    ),
}


@pytest.mark.parametrize("name", DECIDE)
def test_models_that_run_only_on_the_cpu_have_output_shapes(name: str, folder: Path) -> None:
    """Shapes and products equal those of plain PyTorch on the CPU, recorded by the test's own hooks."""
    code, size = DECIDE[name]
    written(folder, code)
    found = seen("own.py:Net", size)
    namespace: dict[str, Any] = {"__name__": "plain"}
    exec(HEAD + code, namespace)
    torch.manual_seed(0)
    model: nn.Module = namespace["Net"]().eval()
    shapes: dict[str, Any] = {}
    for path, module in model.named_modules():

        def keep(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
            shapes.setdefault(path, shape_of(output))

        module.register_forward_hook(keep)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            model(Inputs((size,)).tensors("cpu").args[0])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert found.reason is None
    ran = {path: layer.output_shape for path, layer in found.layers.items()}
    assert {path: shape for path, shape in ran.items() if path in shapes} == shapes
    assert found.macs
    if found.device != "meta":
        assert len(found.notes) == 1
        assert "on the CPU" in found.notes[0]


def test_the_summary_says_where_the_pass_was_made(cli: Cli, folder: Path) -> None:
    written(folder, DECIDE["item"][0])
    result = cli("summary", "own.py:Net", "--input-size", "2,8", "--json")
    assert result.json["device"] == "cpu"
    assert result.json["totals"]["macs"] == 2 * 8 * 4
    assert "the forward pass was made on the CPU" in result.json["notes"][0]
    assert cli("summary", "Linear(8,4)", "--input-size", "2,8", "--json").json["device"] == "meta"


def test_a_model_too_large_for_memory_is_run_under_fake_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder, DECIDE["a state moved to a device"][0])
    monkeypatch.setattr("modelcli.live.memory.available", lambda: 1_000)
    found = seen("own.py:Net", (2, 5, 8))
    assert found.reason is None
    assert found.device == "fake"
    assert found.layers[""].output_shape == [2, 5, 4]
    assert found.macs == 2 * 5 * 16 * (8 + 4)
    assert "under fake tensors" in found.notes[0]
    written(folder, DECIDE["item"][0], "decides.py")
    reason = seen("decides.py:Net", (2, 8)).reason
    assert reason is not None
    assert "needs values" in reason
    assert "memory" in reason


def test_loaded_values_decide(cli: Cli, folder: Path) -> None:
    """A pass on the CPU uses the values of the file and applies the edits."""
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 4)\n"
        "        self.gate = nn.Parameter(torch.zeros(1))\n"
        "    def forward(self, x):\n        y = self.body(x)\n        return y if self.gate.item() > 0 else y[:, :2]\n",
    )
    weights = {"body.weight": zeros(4, 8), "body.bias": zeros(4), "gate": torch.ones(1)}
    torch.save(weights, "open.pth")
    torch.save(weights | {"gate": zeros(1)}, "shut.pth")
    for name, shape in (("open.pth", [2, 4]), ("shut.pth", [2, 2])):
        words = ("summary", "own.py:Net", "--weights", name, "--input-size", "2,8", "--json")
        assert cli(*words).json["layers"][0]["output_shape"] == shape
    cli("load", "own.py:Net", "--weights", "open.pth", "--input-size", "2,8")
    cli("replace", "body", "Linear(8,6)")
    assert cli("summary", "--json").json["layers"][0]["output_shape"] == [2, 6]


def test_an_error_of_the_model_itself_is_reported(folder: Path) -> None:
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + "        self.body = nn.Linear(8, 4)\n    def forward(self, x):\n"
        "        return self.body(x) @ torch.zeros(3, 3)\n",
    )
    reason = seen("own.py:Net", (2, 8)).reason
    assert reason is not None
    assert "2x4 and 3x3" in reason


def test_detection_runs(cli: Cli) -> None:
    """torchvision publishes 583 million MACs for it. The shapes depend on the values of the boxes."""
    document = cli("summary", "ssdlite320_mobilenet_v3_large", "--json").json
    assert document["reason"] is None
    assert document["device"] == "cpu"
    assert round(document["totals"]["macs"] / 1e6) == 583


def test_an_unknown_output_shape_gives_exit_code_2(cli: Cli, folder: Path) -> None:
    """The error gives the reason, after the rows of the other assertions."""
    words = ("check", "Sequential(Linear(4,3),Linear(5,2))", "--input-size", "1,4", "--max-params", "100")
    result = cli(*words, "--output-shape", "1,2", "--json", code=2)
    assert [row["passed"] for row in result.json["checks"]] == [True, False]
    assert "--output-shape cannot be checked: the forward pass ended in 1" in result.error["message"]
    assert "the input size is not known" in cli("check", "Linear(4,3)", "--output-shape", "1,3", code=2).err
    cli("check", "Linear(4,3)", "--input-size", "1,4", "--output-shape", "1,2", code=1)


# --- what flows in ----------------------------------------------------------------------------------------------------

TAKES = (
    "class Two(nn.Module):\n" + INIT + "        self.a = nn.Linear(4, 3)\n"
    "    def forward(self, x, y):\n        return self.a(x) + y\n"
    "class Keyword(Two):\n    def forward(self, *, x, y=0):\n        return self.a(x) + y\n"
    "class Batch(Two):\n    def forward(self, batch):\n        return self.a(batch['image']) * batch['more']['scale']\n"
    "class Several(Two):\n    def forward(self, xs: list[torch.Tensor], steps: int, flag: bool = False):\n"
    "        return torch.cat([self.a(x) for x in xs] * steps) if flag else self.a(xs[0])\n"
    "class State(Two):\n    def forward(self, x, state: tuple[torch.Tensor, torch.Tensor]):\n"
    "        return self.a(x) + (state + (x,))[1]\n"
    "class Nothing(Two):\n    def forward(self):\n        return self.a.weight.sum(0)\n"
    "class Maybe(Two):\n    def forward(self, x=None):\n        return self.a(torch.ones(2, 4) if x is None else x)\n"
    "class Time(Two):\n    def forward(self, x, t):\n        return self.a(x) * t.sin().reshape(-1, 1)\n"
    "class Tokens(nn.Module):\n" + INIT + "        self.a = nn.Embedding(9, 4)\n"
    "    def forward(self, input_ids, attention_mask=None):\n        x = self.a(input_ids)\n"
    "        return x if attention_mask is None else x * attention_mask.unsqueeze(2)\n"
    "class Lightning(Two):\n    example_input_array = None\n    def __init__(self):\n        super().__init__()\n"
    "        self.example_input_array = {'x': torch.zeros(7, 4), 'y': torch.zeros(7, 3)}\n"
)

STATED: dict[str, tuple[str, tuple[str, ...], list[int]]] = {
    "by name": ("Two", ("x=2,4", "y=2,3"), [2, 3]),
    "by position": ("Two", ("2,4", "2,3"), [2, 3]),
    "both": ("Two", ("2,4", "y=1x3"), [2, 3]),
    "by keyword alone": ("Keyword", ("x=2,4",), [2, 3]),
    "a number by keyword": ("Keyword", ("x=2,4", "y==5"), [2, 3]),
    "a dict": ("Batch", ("batch.image=2,4", "batch.more.scale=scalar"), [2, 3]),
    "a list": ("Several", ("xs.0=2,4", "xs.1=5,4", "steps==2", "flag==True"), [14, 3]),
    "a list by position": ("Several", ("0.0=2,4", "0.1=5,4", "==3", "flag==true"), [21, 3]),
    "a tuple": ("State", ("x=1,3", "state.0=1,3", "state.1=1,3"), []),
    "nothing": ("Nothing", ("none",), [4]),
    "nothing though it could": ("Maybe", ("none",), [2, 3]),
    "no dimension": ("Time", ("x=2,4", "t=()"), [2, 3]),
    "no dimension, by its word": ("Time", ("x=2,4", "t=scalar:float32"), [2, 3]),
    "tokens": ("Tokens", ("input_ids=2,6", "attention_mask=2,6"), [2, 6, 4]),
    "whole numbers": ("Tokens", ("2,6:int64",), [2, 6, 4]),
}


@pytest.mark.parametrize("name", STATED)
def test_stated_inputs(name: str, cli: Cli, folder: Path) -> None:
    kind, inputs, shape = STATED[name]
    written(folder, TAKES.replace("nn.Linear(4, 3)", "nn.Linear(3, 3)") if kind == "State" else TAKES)
    words = [word for text in inputs for word in ("--input", text)]
    document = cli("summary", f"own.py:{kind}", *words, "--json").json
    assert document["reason"] is None
    assert document["layers"][0]["output_shape"] == (shape or [1, 3])


def test_inputs_are_given_to_plain_torch_as_they_are_stated() -> None:
    texts = ("a=2,3", "b.x=1:int64", "b.y.0=4", "b.y.1==2.5", "c==hello", "d=scalar:bool")
    given = Inputs((), named=input_texts.parse_all(texts)).tensors("cpu")
    assert given.args == ()
    assert {"a", "b", "c", "d"} == given.kwargs.keys()
    assert given.kwargs["b"]["x"].dtype == torch.int64
    assert (given.kwargs["b"]["y"][0].shape, given.kwargs["b"]["y"][1]) == ((4,), 2.5)
    assert (given.kwargs["c"], given.kwargs["d"].shape, given.kwargs["d"].dtype) == ("hello", (), torch.bool)
    assert [tuple(tensor.shape) for tensor in given] == [(2, 3), (1,), (4,), ()]


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (("z=2,4",), "no argument 'z'"),
        (("x=2,a",), "'2,a' is not a shape"),
        (("x=2,4:float31",), "no dtype 'float31'"),
        (("x=2,4:quint8",), "an input cannot have the quantized dtype quint8"),
        (("x y=2,4",), "'x y' is not the name of an argument"),
        (("none", "x=2,4"), "--input none says that forward takes nothing"),
        (("x=2,4", "x=2,4"), "input x is stated twice"),
        (("x=2,4", "x.a=2,4"), "that contains it"),
        (("2=2,4",), "input 0 is not"),
    ],
)
def test_wrong_inputs_are_errors(inputs: tuple[str, ...], told: str, cli: Cli, folder: Path) -> None:
    written(folder, TAKES)
    words = [word for text in inputs for word in ("--input", text)]
    assert told in cli("summary", "own.py:Two", *words, code=2).err


def test_a_model_with_its_own_example_input(cli: Cli, folder: Path) -> None:
    """The model has Lightning's `example_input_array`, or a forward without arguments."""
    written(folder, TAKES)
    assert cli("summary", "own.py:Lightning", "--json").json["layers"][0]["output_shape"] == [7, 3]
    assert cli("summary", "own.py:Nothing", "--json").json["layers"][0]["output_shape"] == [4]


def test_the_input_in_a_hint_works(cli: Cli, folder: Path) -> None:
    """The command in the hint works once the shapes are filled in."""
    written(folder, TAKES)
    reason = cli("summary", "own.py:Keyword", "--json").json["reason"]
    assert "--input x=SHAPE" in reason
    reason = cli("summary", "own.py:Two", "--json").json["reason"]
    assert "--input x=SHAPE --input y=SHAPE" in reason
    reason = cli("summary", "own.py:Two", "--input-size", "2,4", "--json").json["reason"]
    assert "--input y=SHAPE" in reason
    words = ("summary", "own.py:Two", "--input-size", "2,4", "--input", "y=2,3", "--json")
    assert cli(*words).json["reason"] is None


def test_recipes_and_records_keep_the_inputs(cli: Cli, folder: Path) -> None:
    written(folder, TAKES)
    cli("load", "own.py:Batch", "--input", "batch.image=2,4", "--input", "batch.more.scale=scalar")
    assert 'inputs = ["batch.image=2,4", "batch.more.scale=scalar"]' in (folder / "modelcli.toml").read_text()
    assert cli("log", "--json").json["inputs"] == ["batch.image=2,4", "batch.more.scale=scalar"]
    assert cli("replace", "a", "Linear(_,7)", "--json").json["check"]["ran"]
    cli("save", "out.pth")
    (folder / "modelcli.toml").unlink()
    assert cli("summary", "out.pth", "--json").json["layers"][0]["output_shape"] == [2, 7]
    edited = cli("replace", "a", "Linear(_,9)", "-m", "out.pth", "--trust", "--json").json
    assert edited["check"]["output_shape"] == [2, 9]
    cli("load", "own.py:Nothing", "--input", "none")
    cli("save", "none.safetensors")
    assert cli("summary", "none.safetensors", "--json").json["layers"][0]["output_shape"] == [4]
    (folder / "modelcli.toml").write_text('model = "own.py:Two"\ninputs = ["x=2,4", "y=2,b"]\nedits = []\n')
    assert "modelcli.toml:2: input 'y=2,b': '2,b' is not a shape" in cli("summary", code=2).err
    (folder / "modelcli.toml").write_text('model = "own.py:Two"\ninputs = ["x=2,4"]\nedits = []\n')
    result = cli("summary", "--input", "x=5,4", "--input", "y=5,3", "--json")
    assert result.json["layers"][0]["output_shape"] == [5, 3]


# --- modules that ran, and models that are built in their own way -----------------------------------------------------


def executed(cli: Cli, reference: str, *words: str) -> dict[str, Any]:
    layers = cli("summary", reference, *words, "--json").json["layers"]
    return {layer["path"]: layer["executed"] for layer in layers}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_modules_that_ran_are_not_shown_as_uncalled(cli: Cli, folder: Path) -> None:
    written(
        folder,
        "class Calls(nn.Linear):\n    def __call__(self, x):\n        return F.linear(x, self.weight)\n"
        "class Outer(nn.Module):\n"
        + INIT
        + "        self.direct, self.own = nn.Linear(4, 4), Calls(4, 4)\n"
        + "        self.again = self.alias = nn.Linear(4, 4)\n"
        + "        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))\n"
        + "        self.idle = nn.Linear(4, 4)\n"
        + "    def forward(self, x):\n        x = self.direct.forward(x)\n"
        + "        return self.scripted(self.alias(self.own(x)))\n",
    )
    found = executed(cli, "own.py:Outer", "--input-size", "2,4")
    ran = {path for path, value in found.items() if value}
    assert ran == {".", "direct", "own", "again", "alias", "scripted"}
    assert {path for path, value in found.items() if value is None} == {"scripted.0", "scripted.1"}
    assert [path for path, value in found.items() if value is False] == ["idle"]
    trace = seen("own.py:Outer", (2, 4))
    assert trace.macs == 4 * 2 * 4 * 4
    assert trace.layers["own"].macs == trace.layers["direct"].macs == 2 * 4 * 4
    table = cli("summary", "own.py:Outer", "--input-size", "2,4").out
    assert table.count("(not called)") == 1


@pytest.mark.parametrize("how", ["closure", "default", "method", "partial"])
def test_a_feature_extractor_sees_its_own_features(how: str, cli: Cli, folder: Path) -> None:
    """The usual feature extractor: hooks that reference `self` and write into a dict."""
    hooks = {
        "closure": "self.hook(name)",
        "default": "lambda module, args, out, self=self, name=name: self.features.__setitem__(name, out)",
        "method": "self.keep",
        "partial": "functools.partial(self.named, name)",
    }
    written(
        folder,
        "import functools\nclass Net(nn.Module):\n"
        + INIT
        + "        self.features = {}\n"
        + "        self.body = nn.ModuleDict({'l0': nn.Linear(4, 4), 'l1': nn.Linear(4, 2)})\n"
        + f"        for name in self.body:\n            self.body[name].register_forward_hook({hooks[how]})\n"
        + "    def hook(self, name):\n        def fn(module, args, out):\n            self.features[name] = out\n"
        + "        return fn\n    def keep(self, module, args, out):\n"
        + "        self.features['l0' if 'l0' not in self.features else 'l1'] = out\n"
        + "    def named(self, name, module, args, out):\n        self.features[name] = out\n"
        + "    def forward(self, x):\n        self.features.clear()\n        self.body['l1'](self.body['l0'](x))\n"
        + "        return self.features['l0'], self.features['l1']\n",
    )
    document = cli("summary", "own.py:Net", "--input-size", "3,4", "--json").json
    assert document["reason"] is None
    assert document["layers"][0]["output_shape"] == [[3, 4], [3, 2]]


def test_a_generator_as_forward_counts_as_not_run(cli: Cli, folder: Path) -> None:
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + "        self.a = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        yield self.a(x)\n"
        "class Later(Net):\n    async def forward(self, x):\n        return self.a(x)\n",
    )
    assert "generator" in cli("summary", "own.py:Net", "--input-size", "2,4", "--json").json["reason"]
    assert "async" in cli("summary", "own.py:Later", "--input-size", "2,4", "--json").json["reason"]


def test_deep_nesting_takes_no_longer_than_its_modules(folder: Path) -> None:
    """torchinfo's time doubles with each level; 26 levels took half a minute."""
    depth = 60
    model: nn.Module = nn.Linear(4, 4)
    for _ in range(depth):
        model = nn.Sequential(model, nn.ReLU())
    started = time.process_time()
    found = trace(model, Inputs(((1, 4),))).trace
    assert time.process_time() - started < 10
    assert found.macs == 16
    assert len(found.layers) == 2 * depth + 1


def test_a_view_of_a_parameter_may_flow_in(folder: Path) -> None:
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + "        self.p = nn.Parameter(torch.zeros(3))\n"
        "        self.inner = nn.Bilinear(4, 3, 2)\n    def forward(self, x):\n"
        "        return self.inner(x, self.p.view(1, 3))\n",
    )
    found = seen("own.py:Net", (1, 4))
    assert found.reason is None
    assert found.macs == 2 * 4 * 3 + 2 * 3


def test_models_on_which_torchinfo_fails(cli: Cli, folder: Path) -> None:
    """The models are pruned, compiled, or have a kernel size that is a scalar tensor."""
    written(
        folder,
        "from torch.nn.utils import prune\ndef pruned():\n    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())\n"
        "    prune.l1_unstructured(model[0], 'weight', amount=0.5)\n    return model\n"
        "class Compiled(nn.Module):\n" + INIT + "        self.a = torch.compile(nn.Linear(4, 3))\n"
        "    def forward(self, x):\n        return self.a(x)\n"
        "def kernel():\n    conv = nn.Conv1d(4, 3, 1)\n    conv.kernel_size = torch.tensor(1)\n"
        "    return nn.Sequential(conv)\n",
    )
    for name, size, output in (
        ("pruned()", "2,4", [2, 3]),
        ("Compiled", "2,4", [2, 3]),
        ("kernel()", "1,4,5", [1, 3, 5]),
    ):
        document = cli("summary", f"own.py:{name}", "--input-size", size, "--json").json
        assert document["reason"] is None
        assert document["layers"][0]["output_shape"] == output
        assert document["totals"]["forward_backward_bytes"] > 0
        assert document["totals"]["macs"] > 0


def test_names_of_torch_that_a_class_redefines(cli: Cli, folder: Path) -> None:
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + "        self.a = nn.Linear(4, 4)\n        self.modules = [self.a]\n"
        "    def forward(self, x):\n        return self.modules[0](x)\n",
    )
    assert cli("params", "own.py:Net", "--json").json["totals"]["params"] == 20
    assert executed(cli, "own.py:Net", "--input-size", "2,4") == {".": True, "a": True}
    cli("freeze", "a", "-m", "own.py:Net", "-o", "out.pth")


@pytest.mark.parametrize("name", ["named_modules", "named_parameters", "extra_repr", "_get_name"])
def test_an_attribute_without_which_pytorch_lists_no_model(name: str, cli: Cli, folder: Path) -> None:
    written(
        folder,
        f"class Inner(nn.Module):\n{INIT}        self.a = nn.Linear(4, 4)\n        self.{name} = [1]\n"
        f"class Net(nn.Module):\n{INIT}        self.inner = nn.Sequential(Inner())\n",
    )
    for command in ("summary", "params", "modules"):
        for kind in ("Inner", "Net"):
            error = cli(command, f"own.py:{kind}", code=2).err
            assert f"Inner has an attribute {name}, which hides the method of torch.nn.Module" in error


def test_products_with_sparse_tensors_of_every_layout(cli: Cli, folder: Path) -> None:
    layouts = {"sparse": 4, "sparse_csr": 4, "sparse_csc": 4, "sparse_bsr((2, 2))": 8}
    for layout, stored in layouts.items():
        made = layout if layout.endswith(")") else f"{layout}()"
        written(
            folder,
            f"class Net(nn.Module):\n{INIT}        self.register_buffer('adj', torch.eye(4).to_{made})\n"
            "    def forward(self, x):\n        return self.adj @ x\n",
            f"{layout[:10]}.py",
        )
        document = cli("summary", f"{layout[:10]}.py:Net", "--input-size", "4,6", "--json").json
        assert document["uncounted"] == [], layout
        assert document["totals"]["macs"] == stored * 6, layout


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_products_of_dynamically_quantized_layers(cli: Cli, folder: Path) -> None:
    written(
        folder,
        "def net():\n    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))\n"
        "    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)\n",
    )
    document = cli("summary", "own.py:net", "--input-size", "3,4", "--json").json
    assert document["totals"]["macs"] == 3 * (4 * 5 + 5 * 2)
    assert document["uncounted"] == []


def test_sparse_buffers_and_parameters(cli: Cli, folder: Path) -> None:
    written(
        folder,
        "class Sparse(nn.Module):\n" + INIT + "        self.register_buffer('adj', torch.eye(4).to_sparse())\n"
        "        self.a = nn.Linear(4, 2)\n    def forward(self, x):\n"
        "        return self.a(torch.sparse.mm(self.adj, x))\n"
        "class Made(Sparse):\n    def __init__(self):\n        super().__init__()\n"
        "        self.adj = torch.sparse_coo_tensor([[0, 1], [1, 0]], [1.0, 2.0], (4, 4))\n"
        "class Parameter(Sparse):\n    def __init__(self):\n        super().__init__()\n"
        "        self.w = nn.Parameter(torch.eye(4).to_sparse())\n",
    )
    for name, stored in (("Sparse", 4), ("Made", 2), ("Parameter", 4)):
        rows = {row["name"]: row for row in cli("params", f"own.py:{name}", "--json").json["tensors"]}
        assert rows["adj"]["layout"] == "sparse_coo"
        assert rows["adj"]["bytes"] == stored * (4 + 2 * 8)
        document = cli("summary", f"own.py:{name}", "--input-size", "4,4", "--json").json
        assert document["layers"][0]["output_shape"] == [4, 2]
        assert document["totals"]["macs"] == stored * 4 + 4 * 4 * 2


# --- downloads, weights that a constructor loads, paths ---------------------------------------------------------------

FETCHES = {
    "torch.hub": "torch.hub.load_state_dict_from_url('https://weights.example/w.pth')",
    "urllib": "__import__('urllib.request').request.urlopen('https://weights.example/w.pth')",
    "socket": "__import__('socket').create_connection(('weights.example', 443))",
    "http.client": "__import__('http.client').client.HTTPSConnection('weights.example').request('GET', '/w.pth')",
}


@pytest.mark.parametrize("how", FETCHES)
def test_showing_a_model_names_the_download_that_it_would_need(how: str, cli: Cli, folder: Path) -> None:
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + f"        self.a = nn.Linear(4, 4)\n        {FETCHES[how]}\n"
        "    def forward(self, x):\n        return self.a(x)\n",
    )
    started = time.perf_counter()
    error = cli("summary", "own.py:Net", "--input-size", "2,4", code=2).err
    assert "weights.example" in error
    assert "downloads nothing" in error
    assert time.perf_counter() - started < 20


def test_the_error_names_the_file_that_would_be_downloaded(cli: Cli, folder: Path) -> None:
    """The error of huggingface_hub and timm does not name the file."""
    written(
        folder,
        "class LocalEntryNotFoundError(OSError):\n    pass\n"
        "def hf_hub_download(repo_id, filename):\n    raise LocalEntryNotFoundError('not in the local cache')\n"
        "class Net(nn.Module):\n"
        + INIT
        + "        hf_hub_download('timm/resnet18.a1_in1k', filename='model.safetensors')\n",
    )
    error = cli("summary", "own.py:Net", "--input-size", "2,4", code=2).err
    assert "model.safetensors of timm/resnet18.a1_in1k" in error
    assert "downloads nothing" in error


def test_showing_a_model_sets_the_hub_to_offline_mode(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    written(
        folder,
        "import os\nclass Net(nn.Linear):\n    def __init__(self):\n"
        "        assert os.environ['HF_HUB_OFFLINE'] == '1'\n        super().__init__(4, 4)\n",
    )
    cli("summary", "own.py:Net", "--input-size", "2,4")
    assert "HF_HUB_OFFLINE" not in os.environ


def test_weights_loaded_by_a_constructor_are_not_reported_as_random(cli: Cli, folder: Path) -> None:
    torch.save(nn.Linear(4, 4).state_dict(), "w.pth")
    written(
        folder,
        "class Net(nn.Linear):\n    def __init__(self, path):\n        super().__init__(4, 4)\n"
        "        self.load_state_dict(torch.load(path))\n"
        "class Plain(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 4)\n",
    )
    error = cli("save", "out.pth", "-m", "own.py:Net('w.pth')").err
    assert "randomly initialised" not in error
    assert "loads weights itself" in error
    assert torch.equal(torch.load("out.pth")["weight"], torch.load("w.pth")["weight"])
    assert "was randomly initialised" in cli("save", "plain.pth", "-m", "own.py:Plain").err


def test_paths_in_arguments_are_relative_to_the_recipe_or_the_record(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "there").mkdir()
    (folder / "there" / "size.txt").write_text("7")
    written(
        folder,
        "from pathlib import Path\nclass Net(nn.Linear):\n    def __init__(self, path, others=()):\n"
        "        super().__init__(4, int(Path(path).read_text()))\n",
        "there/own.py",
    )
    (folder / "there" / "modelcli.toml").write_text("model = \"own.py:Net('size.txt')\"\nedits = []\n")
    words = ("params", "--recipe", "there/modelcli.toml", "--json")
    assert cli(*words).json["totals"]["params"] == 35
    # A typed path is relative to the current folder; a recorded one, to the record's folder.
    (folder / "out").mkdir()
    cli("save", "out/made.pth", "-m", "there/own.py:Net('there/size.txt')")
    monkeypatch.chdir(folder / "out")
    assert "runs" in cli("freeze", "weight", "-m", "made.pth", "--trust", "--input-size", "2,4").out
    monkeypatch.chdir(folder)
    cli("load", "there/own.py:Net('there/size.txt')", "--recipe", "out/r.toml")
    assert "own.py:Net('../there/size.txt')" in (folder / "out" / "r.toml").read_text()
    assert cli("params", "--recipe", "out/r.toml", "--json").json["totals"]["params"] == 35


# --- torchinfo's table ------------------------------------------------------------------------------------------------


def test_the_table_of_torchinfo(cli: Cli, folder: Path) -> None:
    from torchvision.models import resnet18

    plain = torchinfo.summary(resnet18(), input_size=(1, 3, 224, 224), verbose=0)
    assert cli("summary", "resnet18", "--layout", "torchinfo").out == f"{plain}\n"
    deeper = torchinfo.summary(resnet18(), input_size=(2, 3, 64, 64), verbose=0, depth=1)
    words = ("--input-size", "2,3,64,64", "--depth", "1")
    assert cli("summary", "resnet18", "--layout", "torchinfo", *words).out == f"{deeper}\n"
    written(
        folder,
        DECIDE["item"][0] + "def nested():\n    model = nn.Linear(4, 4)\n    for _ in range(30):\n"
        "        model = nn.Sequential(model)\n    return model\n",
    )
    assert "Linear" in cli("summary", "own.py:Net", "--input-size", "2,8", "--layout", "torchinfo").out
    error = cli("summary", "own.py:nested()", "--input-size", "2,4", "--layout", "torchinfo", code=2).err
    assert "30 levels of nesting" in error
    assert "makes a fixed table" in cli("summary", "resnet18", "--layout", "torchinfo", "--json", code=2).err
    assert "unknown layout 'keras'" in cli("summary", "resnet18", "--layout", "keras", code=2).err
    error = cli("summary", "Linear(4,3)", "--input-size", "2,5", "--layout", "torchinfo", code=2).err
    assert "torchinfo cannot run this model" in error


def test_an_operator_that_is_called_only_on_other_devices_than_the_cpu(folder: Path) -> None:
    """transformers counts the tokens of each expert so: the CPU has no `histc` of integers, and does not call it."""
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + "        self.a = nn.Linear(4, 4)\n    def forward(self, x):\n"
        "        index = self.a(x).argmax(1)\n"
        "        index = index.float() if x.device.type == 'cpu' else index.int()\n"
        "        return torch.histc(index, 4, 0, 3)\n",
    )
    found = seen("own.py:Net", (2, 4))
    assert found.reason is None
    assert found.device == "cpu"
    assert found.layers[""].output_shape == [4]
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + "        self.a = nn.Linear(4, 4)\n    def forward(self, x):\n"
        "        return torch.histc(self.a(x).argmax(1).int(), 4, 0, 3)\n",
        "everywhere.py",
    )
    reason = seen("everywhere.py:Net", (2, 4)).reason
    assert reason is not None
    assert "histc" in reason


@needs_torch("_grouped_mm")
def test_experts_of_a_model_too_large_for_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like transformers' experts, in float32: 16 rows by the 32 x 32 matrices of 4 experts, and the gate."""
    written(
        folder,
        "class Net(nn.Module):\n" + INIT + "        self.gate = nn.Linear(32, 4)\n"
        "        self.experts = nn.Parameter(torch.zeros(4, 32, 32))\n    def forward(self, x):\n"
        "        top = self.gate(x).argmax(1).sort()[0]\n"
        "        tokens = torch.histc(top.float() if x.device.type == 'cpu' else top.int(), 4, 0, 3)\n"
        "        return torch._grouped_mm(x, self.experts, offs=tokens.cumsum(0, dtype=torch.int32))\n",
    )
    by_hand = 16 * 32 * 4 + 16_384
    found = seen("own.py:Net", (16, 32))
    assert (found.device, found.macs, found.reason) == ("cpu", by_hand, None)
    monkeypatch.setattr("modelcli.live.memory.available", lambda: 1_000)
    found = seen("own.py:Net", (16, 32))
    assert (found.device, found.macs, found.reason) == ("fake", by_hand, None)


def test_a_nested_tensor_in_a_model_is_named(cli: Cli, folder: Path) -> None:
    lines = (
        "import torch",
        "class Net(torch.nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        "        parts = [torch.randn(2, 3), torch.randn(4, 3)]",
        "        self.w = torch.nn.Parameter(torch.nested.nested_tensor(parts))",
    )
    (folder / "own.py").write_text("\n".join(lines))
    for command in ("params", "summary"):
        assert "w of Net is a nested tensor" in cli(command, "own.py:Net", code=2).err

"""Forward passes on meta: the shapes and MACs of a real pass, partial results, and describe() on unusual models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchinfo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.language.references import Source
from modelcli.live.describe import describe
from modelcli.live.inputs import Inputs
from modelcli.live.opening import open_live
from modelcli.live.planning import traced
from modelcli.live.trace import run, shape_of
from modelcli.model.blueprint import Blueprint
from modelcli.model.printed import repr_text
from tests import nets
from tests.conftest import Cli


def looked_at(reference: str, *sizes: tuple[int, ...], dtype: str = "float32") -> Blueprint:
    return traced(open_live(Source(reference, input_size=sizes or None, input_dtype=(dtype,))))


def real_shapes(model: nn.Module, *inputs: torch.Tensor) -> dict[str, list[int]]:
    """Return the output shapes of a real pass on the CPU, recorded by the test's own hooks."""
    found: dict[str, list[int]] = {}
    for name, module in model.named_modules():

        def keep(_module: nn.Module, _args: object, output: object, name: str = name) -> None:
            found.setdefault(name, shape_of(output))

        module.register_forward_hook(keep)
    with torch.no_grad():
        model.eval()(*inputs)
    return found


def test_shapes_are_those_of_a_real_pass(folder: object) -> None:
    trace = looked_at("nets.py:Unusual", (2, 4)).trace
    assert trace is not None
    real = real_shapes(nets.Unusual(), torch.zeros(2, 4))
    assert {path: layer.output_shape for path, layer in trace.layers.items() if path != "again"} == real
    # One call under each path of the shared module, as its caller uses it.
    assert trace.layers["again"].output_shape == [2, 4]
    assert [trace.layers[path].macs for path in ("first", "first.lin", "again")] == [32, 32, 32]
    assert trace.layers[""].output_shape == {"left": [2, 2], "right": [2, 3]}
    assert "spare" not in trace.layers


def test_sizes_are_torchinfos(folder: object) -> None:
    """The forward/backward size is torchinfo's for a real model; the input size is four bytes for each element."""
    trace = looked_at("nets.py:Net", (2, 1, 8, 8)).trace
    assert trace is not None
    peer = torchinfo.summary(nets.Net(), input_size=(2, 1, 8, 8), verbose=0)
    assert trace.input_bytes == 2 * 8 * 8 * 4
    assert trace.forward_backward_bytes == peer.total_output_bytes


def test_macs_by_hand(folder: object) -> None:
    trace = looked_at("nets.py:Net", (2, 1, 8, 8)).trace
    assert trace is not None
    assert trace.layers["conv1"].macs == 2 * 8 * 8 * 3
    assert trace.layers["conv2"].macs == 2 * 8 * 8 * 5 * 3
    assert trace.macs == trace.layers[""].macs == 2 * 8 * 8 * 18


def test_attention_counts_its_submodules() -> None:
    """The fused path of attention would skip the submodules and their MACs."""
    text = "TransformerEncoder(TransformerEncoderLayer(8,2,16,batch_first=True),2,enable_nested_tensor=False)"
    trace = looked_at(text, (1, 5, 8)).trace
    assert trace is not None
    assert trace.reason is None
    layer = trace.layers["layers.1"].macs
    projections, feed_forward, scores = 5 * 8 * 24 + 5 * 8 * 8, 2 * 5 * 8 * 16, 2 * 5 * 5 * 8
    assert layer == projections + feed_forward + scores
    assert "layers.0.self_attn" in trace.layers


def test_lazy_parameters_get_their_shapes(folder: object) -> None:
    blueprint = looked_at("nets.py:Unusual", (2, 4))
    assert blueprint.by_name["heads.right.weight"].shape == (3, 4)
    assert describe(nets.Unusual()).by_name["heads.right.weight"].shape is None


def test_a_shared_module_is_shown_twice_and_counted_once(folder: object) -> None:
    blueprint = looked_at("nets.py:Unusual", (2, 4))
    assert blueprint.by_path["again"].shared_with == "first.lin"
    assert blueprint.by_name["again.weight"].tied_to == "first.lin.weight"
    model = nets.Unusual()
    model(torch.zeros(2, 4))
    assert blueprint.totals.params == sum(p.numel() for p in model.parameters())
    assert blueprint.params_of("again") == 20


def test_a_pass_that_fails_gives_its_rows() -> None:
    blueprint = looked_at("Sequential(Linear(4,3),ReLU(),Linear(5,2))", (1, 4))
    trace = blueprint.trace
    assert trace is not None
    assert list(trace.layers) == ["0", "1"]
    assert trace.macs is None
    assert trace.reason is not None
    assert trace.reason.startswith("the forward pass ended in 2: ")


def test_no_input_known() -> None:
    trace = looked_at("Linear(4,3)").trace
    assert trace is not None
    assert trace.reason == "the input size is not known: pass --input-size, batch included"


def test_several_inputs() -> None:
    trace = looked_at("Bilinear(3,4,2)", (5, 3), (5, 4)).trace
    assert trace is not None
    assert trace.layers[""].output_shape == [5, 2]
    assert trace.inputs == ((5, 3), (5, 4))


def test_train_mode(cli: Cli) -> None:
    """googlenet returns its auxiliary outputs only in train mode."""
    words = ("summary", "googlenet", "--input-size", "2,3,224,224", "--json")
    executed = [
        {layer["path"]: layer["executed"] for layer in cli(*words, "--mode", mode).json["layers"]}["aux1"]
        for mode in ("eval", "train")
    ]
    assert executed == [False, True]


def test_inputs_for_a_real_pass() -> None:
    inputs = Inputs(((2, 3), (4,)), ("bfloat16", "int64"))
    first, second = inputs.tensors("cpu")
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.int64)
    assert [t.device.type for t in inputs.tensors("meta")] == ["meta", "meta"]


@pytest.mark.parametrize(
    "model",
    [
        nets.Net(),
        nets.Tied(),
        nets.Unusual(),
        nn.Sequential(),
        nn.ModuleList([nn.Linear(2, 2) for _ in range(3)] + [nn.ReLU()]),
        nn.ParameterList([nn.Parameter(torch.zeros(2))]),
        nn.Transformer(8, 2, 1, 1, 8, batch_first=True),
        nn.LSTM(2, 3, num_layers=2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_printed_as_pytorch_prints_it(model: nn.Module) -> None:
    assert repr_text(describe(model)) == repr(model)


def test_a_module_that_holds_itself() -> None:
    """No model that runs contains itself, but showing such a model must still terminate."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].extra = model
    assert [module.path for module in describe(model).modules] == ["", "0"]


def test_a_forward_that_catches_an_exception(folder: Path) -> None:
    (folder / "tries.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b = nn.Linear(9, 2), nn.Linear(3, 2)\n    def forward(self, x):\n"
        "        try:\n            return self.a(x)\n        except RuntimeError:\n            return self.b(x)\n"
    )
    trace = looked_at("tries.py:Net", (1, 3)).trace
    assert trace is not None
    assert sorted(trace.layers) == ["", "b"]


def test_modes_see_each_operator_of_the_pass() -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    names = Names()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    seen = run(model, [torch.zeros(1, 2, device="meta")], modes=[names])
    assert seen.failure is None
    assert names.seen[-2:] == ["aten.addmm.default", "aten.relu.default"]


def test_a_failure_names_the_file_and_line_of_the_users_code(cli: Cli, folder: Path) -> None:
    lines = (
        "import torch",
        "class Net(torch.nn.Module):",
        "    def __init__(self, wrong=False):",
        "        super().__init__()",
        "        self.a, self.b = torch.nn.Linear(4, 8), torch.nn.Linear(9, 2)",
        "        self.wrong = wrong",
        "    def forward(self, x):",
        "        x = self.a(x)",
        "        if self.wrong:",
        "            x = x.view(-1, 7)",
        "        return self.b(x)",
    )
    (folder / "own.py").write_text("\n".join(lines))
    totals = cli("summary", "own.py:Net", "--input-size", "1,4").out
    assert "the forward pass ended in b (own.py:11): [1,8] float32 flows in, it expects [*,9]" in totals
    totals = cli("summary", "own.py:Net(wrong=True)", "--input-size", "1,4").out
    assert "the forward pass ended in the model itself (own.py:10): " in totals

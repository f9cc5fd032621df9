"""`check --same-output-as`: compared with the outputs that hooks of plain PyTorch see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import Cli

OWN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)
    def forward(self, x):
        return x + self.fc(self.norm(x)).relu()

class Net(nn.Module):
    def __init__(self, width=8, head=3, dtype=torch.float32):
        super().__init__()
        self.unused = nn.Linear(1, 1)
        self.head = nn.Linear(width, head)
        self.blocks = nn.ModuleList([Block(width), Block(width), Block(width)])
        self.stem = nn.Linear(4, width)
        self.to(dtype)
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "features": x}

class Turned(Net):
    def forward(self, x):
        return {"logits": super().forward(x)["logits"]}

class Quiet(Net):
    def forward(self, x):
        return super().forward(x)["logits"] * 0

class Broken(Net):
    def forward(self, x):
        return self.head(self.stem(x)[..., 1:])
"""
ARCH = ("--arch", "own.py:Net()")
SIZE = ("--trust", "--input-size", "2,4")


@pytest.fixture
def net(folder: Path) -> Callable[[], nn.Module]:
    """Makes the module of `own.py`, always with the same values."""
    (folder / "own.py").write_text(OWN)

    def make(**given: Any) -> nn.Module:
        names: dict[str, Any] = {}
        exec(OWN, names)
        torch.manual_seed(0)
        module: nn.Module = names["Net"](**given)
        return module

    return make


def saved(cli: Cli, module: nn.Module, name: str, reference: str = "own.py:Net()") -> str:
    """Save a module as a checkpoint that records its architecture."""
    torch.save(module.state_dict(), "bare.pth")
    cli("save", name, "-m", "bare.pth", "--arch", reference, *SIZE, "--force")
    return name


def bare(module: nn.Module, name: str) -> str:
    """Save the state dict of a module, which `ARCH` names the architecture of."""
    torch.save(module.state_dict(), name)
    return name


def row(cli: Cli, *words: object, code: int = 0) -> dict[str, Any]:
    document = cli("check", *words, *SIZE, "--json", code=code).json
    (found,) = document["checks"]
    assert found["check"] == "same-output-as"
    assert found["passed"] == (code == 0) == document["passed"]
    return dict(found)


def by_hooks(one: nn.Module, other: nn.Module) -> tuple[str, float]:
    """The first module, in the order in which calls end, whose output differs by more than 1e-5 of its largest value,
    and the largest difference of the logits: both from forward hooks."""
    torch.manual_seed(1)
    value = torch.randn(2, 4)
    seen: list[list[tuple[str, torch.Tensor]]] = []
    for module in (one.eval(), other.eval()):
        outputs: list[tuple[str, torch.Tensor]] = []
        handles = [
            part.register_forward_hook(lambda _m, _i, output, path=path, into=outputs: into.append((path, output)))
            for path, part in module.named_modules()
            if path
        ]
        with torch.no_grad():
            module(value)
        for handle in handles:
            handle.remove()
        seen.append(outputs)
    for (path, before), (_, after) in zip(*seen, strict=True):
        if (before - after).abs().max() > 1e-5 * before.abs().max():
            return path, float((before - after).abs().max())
    return "", 0.0


def test_it_names_the_first_module_that_hooks_see_diverge(cli: Cli, net: Callable[..., nn.Module]) -> None:
    """Whatever layer has other values; modules are declared in another order than they run in."""
    bare(net(), "one.pth")
    for layer in ("stem", "blocks.0.norm", "blocks.2.fc", "head"):
        other = net()
        other.get_submodule(layer).bias.data += 0.25
        bare(other, "other.pth")
        path, _ = by_hooks(net(), other)
        assert path == layer
        found = row(cli, "other.pth", "--same-output-as", "one.pth", *ARCH, code=1)
        assert found["first_module"] == {"path": path, "type": type(other.get_submodule(path)).__name__}
        assert f"{path} ({type(other.get_submodule(path)).__name__}) is the first module with another output" in str(
            found["found"]
        )
        assert found["wanted"] == "one.pth"
    alone = net()
    alone.unused.weight.data += 1  # type: ignore[union-attr, operator]
    bare(alone, "other.pth")
    assert row(cli, "other.pth", "--same-output-as", "one.pth", *ARCH)["found"] == "equal bit for bit"


def test_the_largest_difference_is_that_of_plain_pytorch(cli: Cli, net: Callable[..., nn.Module]) -> None:
    other = net()
    other.head.bias.data[1] += 0.5  # type: ignore[union-attr, operator]
    found = row(cli, bare(other, "b.pth"), "--same-output-as", bare(net(), "a.pth"), *ARCH, code=1)
    assert found["max_abs_diff"] == pytest.approx(0.5, abs=1e-6)
    assert "output logits differs by up to 0.5" in found["found"]


def test_tolerances(cli: Cli, net: Callable[..., nn.Module]) -> None:
    """The default is 1e-5 of the largest value; rtol and atol are those of torch.isclose, for each element."""
    near, far = net(), net()
    near.stem.bias.data += 1e-7  # type: ignore[union-attr, operator]
    far.stem.bias.data += 1e-3  # type: ignore[union-attr, operator]
    bare(net(), "a.pth")
    bare(near, "near.pth")
    bare(far, "far.pth")
    found = row(cli, "near.pth", "--same-output-as", "a.pth", *ARCH)
    assert "is allowed" in found["found"]
    assert 0 < found["max_abs_diff"] < 1e-5
    assert "rtol 0" in row(cli, "near.pth", "--same-output-as", "a.pth", *ARCH, "--rtol", "0", code=1)["found"]
    row(cli, "far.pth", "--same-output-as", "a.pth", *ARCH, code=1)
    row(cli, "far.pth", "--same-output-as", "a.pth", *ARCH, "--atol", "1e-2")
    wide = row(cli, "far.pth", "--same-output-as", "a.pth", *ARCH, "--rtol", "1e-6", "--atol", "1e-6", code=1)
    assert "by more than rtol 1e-06 and atol 1e-06 allow in" in wide["found"]
    assert wide["first_module"] == {"path": "stem", "type": "Linear"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rtol", "1"), "--rtol works only with --same-output-as"),
        (("--same-output-as", "own.py:Net()", "--atol", "-1"), "--atol -1 is no tolerance"),
        (("--same-output-as", "own.py:Net()", "--rtol", "nan"), "--rtol nan is no tolerance"),
        (("--same-output-as", "missing.pth"), "no such file: missing.pth"),
        (("--same-output-as", "bare.pth"), "neither bare.pth nor bare.pth records its architecture"),
        (("--same-output-as", "own.py:Broken()"), "own.py:Broken() does not run"),
    ],
)
def test_mistakes(cli: Cli, net: Callable[..., nn.Module], words: tuple[str, ...], says: str) -> None:
    torch.save(net().state_dict(), "bare.pth")
    model = "bare.pth" if "bare.pth" in words else "own.py:Net()"
    assert says in " ".join(cli("check", model, *words, *SIZE, code=2).err.split())


def test_a_bare_checkpoint_runs_in_the_architecture_of_the_other(cli: Cli, net: Callable[..., nn.Module]) -> None:
    """A builder, a bare file and one with a record, in any order."""
    torch.save(net().state_dict(), "bare.pth")
    save_file(net().state_dict(), "bare.safetensors")
    saved(cli, net(), "record.pth")
    for one, other in (("bare.pth", "record.pth"), ("record.pth", "bare.safetensors")):
        told = cli("check", one, "--same-output-as", other, *SIZE).err
        bare, named = sorted((one, other), key=lambda name: not name.startswith("bare"))
        assert f"{bare} records no architecture, and runs in that of {named}" in " ".join(told.split())
    found = row(cli, "own.py:Net()", "--same-output-as", "bare.pth", "--seed", "5", code=1)
    assert found["first_module"] == {"path": "stem", "type": "Linear"}  # the other random values
    cli("check", "bare.pth", "--same-output-as", "bare.safetensors", "--arch", "own.py:Net()", *SIZE)


def test_random_values_are_told(cli: Cli, net: Callable[..., nn.Module]) -> None:
    saved(cli, net(), "a.pth")
    told = cli("check", "own.py:Net()", "--same-output-as", "own.py:Net()", *SIZE)
    assert "equal bit for bit" in told.out


def test_other_structures(cli: Cli, net: Callable[..., nn.Module]) -> None:
    """Another output, another shape, a model that does not run, and an output that tells nothing."""
    saved(cli, net(), "a.pth")
    saved(cli, net(), "turned.pth", "own.py:Turned()")
    found = row(cli, "turned.pth", "--same-output-as", "a.pth", code=1)
    assert "the output has another structure: features in a.pth alone" in found["found"]
    assert found["first_module"] is None
    cli("replace", "head", "Linear(_,5)", "-m", "a.pth", "-o", "five.pth", *SIZE)
    found = row(cli, "five.pth", "--same-output-as", "a.pth", code=1)
    assert "output logits is float32[2,5] in five.pth and float32[2,3] in a.pth" in found["found"]
    assert found["first_module"] == {"path": "head", "type": "Linear"}
    found = row(cli, "own.py:Broken()", "--same-output-as", "a.pth", code=1)
    assert "it does not run: the forward pass ended in head" in found["found"]
    told = cli("check", "own.py:Quiet()", "--same-output-as", "own.py:Quiet()", *SIZE)
    assert "the output shows nothing, so the check compared the outputs of" in " ".join(told.err.split())


def test_nan_in_one_model_alone(cli: Cli, net: Callable[..., nn.Module]) -> None:
    other = net()
    other.blocks[1].fc.bias.data[0] = torch.nan  # type: ignore[index, union-attr]
    found = row(cli, bare(other, "b.pth"), "--same-output-as", bare(net(), "a.pth"), *ARCH, code=1)
    assert "NaN" in found["found"]
    assert found["max_abs_diff"] == "NaN"
    assert found["first_module"] == {"path": "blocks.1.fc", "type": "Linear"}


def test_wrapped_modules_are_compared_at_their_path(cli: Cli, net: Callable[..., nn.Module]) -> None:
    """Where one model has a module that the other has not, the next one of the same path is compared."""
    saved(cli, net(), "a.pth")
    cli("wrap", "blocks.1", "Sequential(_, Identity())", "-m", "a.pth", "-o", "same.pth", *SIZE)
    row(cli, "same.pth", "--same-output-as", "a.pth")
    cli("wrap", "blocks.1", "Sequential(_, Tanh())", "-m", "a.pth", "-o", "other.pth", *SIZE)
    found = row(cli, "other.pth", "--same-output-as", "a.pth", code=1)
    assert found["first_module"] == {"path": "blocks.1", "type": "Sequential"}


def test_another_dtype_is_compared_by_values(cli: Cli, net: Callable[..., nn.Module]) -> None:
    """Each model gets the input in its own dtype; the usual tolerance is that of the narrower one."""
    saved(cli, net(), "a.pth")
    cli("cast", ".", "bfloat16", "-m", "a.pth", "-o", "half.pth", *SIZE)
    row(cli, "half.pth", "--same-output-as", "a.pth")
    row(cli, "a.pth", "--same-output-as", "half.pth", "--atol", "0.1")
    row(cli, "half.pth", "--same-output-as", "a.pth", "--rtol", "1e-6", code=1)


def test_a_folder_of_hugging_face_and_its_conversions(cli: Cli, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "llama")
    cli("save", "llama.safetensors", "-m", "llama/")
    found = cli("check", "llama.safetensors", "--same-output-as", "llama/", "--json").json["checks"][0]
    assert found["found"] == "equal bit for bit"
    model.model.layers[1].mlp.up_proj.weight.data *= 1.5
    model.save_pretrained(folder / "other")
    found = cli("check", "other/", "--same-output-as", "llama/", "--json", code=1).json["checks"][0]
    assert found["first_module"] == {"path": "model.layers.1.mlp.up_proj", "type": "Linear"}
    document = json.loads((folder / "other" / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "fp8"}
    (folder / "other" / "config.json").write_text(json.dumps(document))
    state = {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    save_file(state, folder / "other" / "model.safetensors")
    told = " ".join(cli("check", "other/", "--same-output-as", "llama/", code=2).err.split())
    assert "the weights in other/ are quantized, so its class cannot run them" in told


def test_the_model_of_a_recipe_with_its_edits(cli: Cli, net: Callable[..., nn.Module]) -> None:
    """The input is that of the edited model: a part takes another one."""
    cli("load", saved(cli, net(), "a.pth"), *SIZE)
    cli("extract", "head")
    cli("save", "head.pth")
    found = cli("check", "--same-output-as", "head.pth", "--trust", "--json").json["checks"][0]
    assert found["found"] == "equal bit for bit"
    cli("init", ".", "ones_")
    cli("check", "--same-output-as", "head.pth", "--trust", code=1)


def test_models_that_take_other_inputs(cli: Cli) -> None:
    told = " ".join(cli("check", "squeezenet1_1", "--same-output-as", "inception_v3", code=2).err.split())
    assert "squeezenet1_1 takes [1,3,224,224], inception_v3 [1,3,299,299]" in told
    cli("check", "squeezenet1_1", "--same-output-as", "squeezenet1_1", "--input-size", "1,3,64,64")


def test_the_tolerances_of_the_help_are_those_that_are_used(cli: Cli) -> None:
    from modelcli.live.same_outputs import TOLERANCES

    stated = (TOLERANCES[torch.float32], TOLERANCES[torch.float16], TOLERANCES[torch.bfloat16])
    assert stated == (1e-5, 1e-3, 1.6e-2)
    shown = " ".join(cli("check", "--help").out.replace("│", " ").split())
    assert "1e-5 of the largest value for float32, 1e-3 for float16, 1.6e-2 for bfloat16" in shown

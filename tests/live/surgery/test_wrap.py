"""wrap: compared with the statement of plain PyTorch, `model.fc = nn.Sequential(model.fc, ...)`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import modelcli
from modelcli.errors import ModelcliError, RequestError
from tests.conftest import Cli

OWN = '''
import torch
from torch import nn

class LoRA(nn.Module):
    """Reads shapes, and draws."""
    def __init__(self, base, r=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(r, base.in_features, device=base.weight.device))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, r))
    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T

class Scaled(nn.Module):
    """Reads values into a new tensor; it wants them outside the meta device."""
    def __init__(self, base):
        super().__init__()
        self.add_module("old", base)
        self.register_buffer("largest", base.weight.detach().abs().max())
    def forward(self, x):
        return self.old(x) / self.largest

def halved(module):
    with torch.no_grad():
        module.weight.mul_(0.5)
    return module

def nothing(module):
    pass

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 5, bias=False)})
        self.heads["left"].weight = self.embed.weight
        self.again = self.blocks[0]
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["left"](self.norm(self.again(x)))
'''


@pytest.fixture
def own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's own, `own.py`, and a checkpoint `a.pth` of its `Net` with all kinds of tensors."""
    (folder / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return importlib.import_module("own")


def run(script: str) -> None:
    exec(compile(script, "made.py", "exec"), {})


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def assert_same(found: nn.Module, expected: nn.Module, x: torch.Tensor) -> None:
    assert repr(found) == repr(expected)
    assert states_equal(found, expected)
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert torch.equal(found.eval()(x), expected.eval()(x))


# --- beside the statement of plain PyTorch ---------------------------------------------------------------------------

WEIGHT_NORM = "torch.nn.utils.parametrizations:weight_norm(_)"

#: The path, the wrapper, and what plain PyTorch writes.
WRAPPERS: dict[str, tuple[str, str, Callable[[Any, nn.Module], nn.Module]]] = {
    "around": ("blocks.1", "Sequential(_,Dropout(0.5))", lambda _, old: nn.Sequential(old, nn.Dropout(0.5))),
    "before": ("blocks.1", "Sequential(ReLU(),_)", lambda _, old: nn.Sequential(nn.ReLU(), old)),
    "nested": (
        "norm",
        "Sequential(Sequential(_),ReLU())",
        lambda _, old: nn.Sequential(nn.Sequential(old), nn.ReLU()),
    ),
    "shared": ("blocks.0 again", "Sequential(_,ReLU())", lambda _, old: nn.Sequential(old, nn.ReLU())),
    "tied": ("heads.left", "Sequential(_,ReLU())", lambda _, old: nn.Sequential(old, nn.ReLU())),
    "table": ("embed", "Sequential(_,Dropout(0.5))", lambda _, old: nn.Sequential(old, nn.Dropout(0.5))),
    "norm": ("blocks.1", WEIGHT_NORM, lambda _, old: parametrizations.weight_norm(old)),
    "values": ("blocks.1", "own:Scaled(_)", lambda own, old: own.Scaled(old)),
    "in place": ("blocks.1", "own:halved(_)", lambda own, old: own.halved(old)),
    "root": (".", "Sequential(_,Softmax(-1))", lambda _, old: nn.Sequential(old, nn.Softmax(-1))),
}


def words_of(case: str) -> list[str]:
    path, wrapper, _ = WRAPPERS[case]
    first, *more = path.split()
    return ["wrap", first, wrapper, *(word for other in more for word in ("--also", other))]


def wrapped(own: Any, model: nn.Module, case: str) -> nn.Module:
    path, _, make = WRAPPERS[case]
    if path == ".":
        return make(own, model)
    paths = path.split()
    new = make(own, model.get_submodule(paths[0]))
    for name in paths:
        model.set_submodule(name, new)
    return model


@pytest.mark.parametrize("case", list(WRAPPERS))
def test_a_file_holds_what_plain_torch_makes(cli: Cli, own: Any, case: str) -> None:
    cli("apply", "-m", "own.py:Net", "-e", "freeze embed blocks.1", "-o", "a.pth")
    model = modelcli.load("a.pth", trust=True)
    cli(*words_of(case), "-m", "a.pth", "-o", "b.pth", "--trust", "--input-size", "2,3", "--input-dtype", "int64")
    expected = wrapped(own, model, case)
    found = modelcli.load("b.pth", trust=True)
    assert_same(found, expected, torch.tensor([[0, 1, 4], [2, 2, 3]]))
    assert torch.load("b.pth", weights_only=True).keys() == expected.state_dict().keys()


@pytest.mark.parametrize("case", list(WRAPPERS))
def test_a_model_in_memory_is_wrapped_alike(own: Any, case: str) -> None:
    torch.manual_seed(0)
    model = own.Net().eval()
    expected = wrapped(own, deepcopy(model), case).eval()
    path, old = WRAPPERS[case][0], dict(model.named_modules())
    found = modelcli.apply(model, " ".join(words_of(case)))
    assert_same(found, expected, torch.tensor([[0, 1, 4], [2, 2, 3]]))
    assert not any(part.training for part in found.modules())
    if path in old:
        assert any(part is old[path] for part in found.modules())


@pytest.mark.parametrize(
    "wrapper",
    ["own:LoRA(_,r=2)", "torch.nn.utils.parametrizations:spectral_norm(_)", "Sequential(_,BatchNorm1d(4),PReLU())"],
)
def test_what_is_drawn_is_what_the_script_draws(cli: Cli, own: Any, wrapper: str) -> None:
    """All draw from one generator, in order. The norms read the values of each module."""
    cli("save", "a.pth", "-m", "own.py:Net")
    words = ("-e", f"wrap blocks.* {wrapper} --except blocks.0", "-e", f"wrap again {wrapper} --also blocks.0")
    cli("apply", "-m", "a.pth", *words, "-o", "b.pth", "--trust", "--check", "none")
    run(cli("script", "-m", "a.pth", *words, "-o", "c.pth", "--trust").out)
    found, expected = (torch.load(name, weights_only=True) for name in ("b.pth", "c.pth"))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    real = modelcli.load("a.pth", trust=True)
    modelcli.apply(real, *words[1::2])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in real.state_dict().items())


def test_many_alike_are_a_loop_and_draw_in_order(cli: Cli) -> None:
    cli("save", "a.pth", "-m", f"Sequential({','.join(['Linear(3,3)'] * 6)})")
    for wrapper in (WEIGHT_NORM, "Sequential(_,Linear(3,3))"):
        words = ("-e", f"wrap *:Linear '{wrapper}'")
        cli("apply", "-m", "a.pth", *words, "-o", "b.pth", "--check", "none", "--force")
        script = cli("script", "-m", "a.pth", *words, "-o", "c.pth").out
        assert "model.get_submodule(name)" in script
        run(script)
        found, expected = (torch.load(name, weights_only=True) for name in ("b.pth", "c.pth"))
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_script_has_the_statement_of_plain_torch(cli: Cli) -> None:
    out = cli("script", "-m", "resnet18", "-e", "wrap fc Sequential(_,Dropout(0.5))", "-o", "b.pth").out
    assert "model.fc = nn.Sequential(model.fc, nn.Dropout(0.5))\n" in out
    out = cli("script", "-m", "resnet18", "-e", f"wrap fc {WEIGHT_NORM}", "-o", "b.pth").out
    assert "model.fc = nn.utils.parametrizations.weight_norm(model.fc)\n" in out


def test_dtype_and_mode_follow_the_old_module() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half().eval()
    model[1].train()
    modelcli.apply(model, "wrap 0 Sequential(_,Linear(4,4))")
    modelcli.apply(model, "wrap 1 Sequential(_,Linear(2,2))")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert [part.training for part in (model[0], model[0][0], model[0][1])] == [False] * 3
    assert [part.training for part in (model[1], model[1][0], model[1][1])] == [True] * 3


def test_a_copy_that_a_wrapper_makes_has_the_values(cli: Cli) -> None:
    """`TransformerEncoder` holds copies of its layer, and not the layer."""
    cli("save", "a.pth", "-m", "Sequential(TransformerEncoderLayer(4,2,8))")
    cli(
        "wrap",
        "0",
        "TransformerEncoder(_,2,enable_nested_tensor=False)",
        "-m",
        "a.pth",
        "-o",
        "b.pth",
        "--check",
        "none",
    )
    old, new = (torch.load(name, weights_only=True) for name in ("a.pth", "b.pth"))
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name.replace("0.layers.0.", "0.").replace("0.layers.1.", "0.")])


def test_a_wrapper_that_reads_no_values_leaves_the_file_alone(cli: Cli, own: Any, monkeypatch: Any) -> None:
    from modelcli.live import meta_models

    def refuse(_tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a value of the old module was read")

    cli("save", "a.pth", "-m", "own.py:Net")
    monkeypatch.setattr(meta_models, "real_tensor", refuse)
    cli("wrap", "blocks.1", "own:LoRA(_,r=2)", "-m", "a.pth", "-o", "b.pth", "--trust", "--check", "none")
    with pytest.raises(AssertionError, match="was read"):
        cli("wrap", "blocks.1", WEIGHT_NORM, "-m", "a.pth", "-o", "c.pth", "--trust", "--check", "none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wrap blocks.1 Linear(2,3)", "Linear(2,3) has no _"),
        ("wrap blocks.1 Sequential(_,_)", "has 2 _, and the old module has one place"),
        ("wrap blocks.1 Linear(_,_)", "has 2 _, and the old module has one place"),
        ("wrap blocks.1 Dropout(_)", "blocks.1: Dropout(_): "),
        ("wrap blocks.1 own:nothing(_)", "own:nothing(_) gives NoneType, not an nn.Module"),
        ("wrap blocks.1 Sequential(_,Linear(2,2,device='cpu'))", "device has no place here"),
        ("wrap blocks.0 Sequential(_)", "blocks.0 is one module with 2 names (blocks.0, again)"),
        ("wrap blocks Sequential(_) --also blocks.1", "blocks.1 lies inside blocks, and both match"),
        ("wrap nowhere Sequential(_)", "nowhere"),
        ("wrap blocks.1 torch.nn.utils.parametrizations:weight_norms(_)", "no class"),
        (f"wrap blocks {WEIGHT_NORM}", "' does not have a parameter, a buffer, or a parametrized element with name"),
        ("wrap blocks.1 torch.nn.utils.parametrizations:Linear(_)", "no class"),
        ("wrap blocks.1", "wrap takes a target and a module"),
        (f"wrap blocks.1 {WEIGHT_NORM.replace('_)', '_,name=3)')}", "does not have a parameter"),
        ("wrap again own:LoRA(_,r=-1) --also blocks.0", "negative dimension"),
    ],
)
def test_what_is_refused_leaves_the_model_alone(own: Any, line: str, message: str) -> None:
    model = own.Net()
    before, state, kinds = repr(model), deepcopy(model.state_dict()), [type(part) for part in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, line)
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert repr(model) == before
    assert [type(part) for part in model.modules()] == kinds
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_later_error_takes_a_parametrization_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    expected = deepcopy(model)
    with pytest.raises(RequestError, match="nowhere"):
        modelcli.apply(model, f"wrap 0 {WEIGHT_NORM}", "freeze nowhere")
    assert not parametrize.is_parametrized(model[0])
    assert states_equal(model, expected)
    x = torch.randn(2, 3)
    assert torch.equal(model(x), expected(x))


def test_code_of_ones_own_needs_trust(cli: Cli, own: Any) -> None:
    cli("save", "a.pth", "-m", "Sequential(Linear(3,3))")
    cli("wrap", "0", "own:LoRA(_,r=2)", "-m", "a.pth", "-o", "b.pth", "--check", "none")
    with pytest.raises(ModelcliError, match="--trust"):
        modelcli.load("b.pth")
    assert type(modelcli.load("b.pth", trust=True)[0]).__name__ == "LoRA"


# --- files that record no architecture -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("fc", "Sequential(_,Dropout(0.5))"), {"fc.0.weight": "fc.weight", "fc.0.bias": "fc.bias"}),
        ((".", "Sequential(_,Softmax(1))"), {f"0.{name}": name for name in ("fc.weight", "fc.bias", "body.0.weight")}),
        (("body", "ModuleDict({'old':_})"), {"body.old.0.weight": "body.0.weight"}),
    ],
)
def test_the_keys_of_a_state_dict_move(cli: Cli, words: tuple[str, str], expected: dict[str, str]) -> None:
    state = {"body.0.weight": torch.randn(3, 3), "fc.weight": torch.randn(2, 3), "fc.bias": torch.randn(2)}
    torch.save(state, "a.pth")
    cli("wrap", *words, "-m", "a.pth", "-o", "b.pth")
    found = torch.load("b.pth", weights_only=True)
    moved = {old: new for new, old in expected.items()}
    assert list(found) == [moved.get(name, name) for name in state]
    assert all(torch.equal(found[moved.get(name, name)], value) for name, value in state.items())


@pytest.mark.parametrize("wrapper", ["Sequential(_,PReLU())", "Sequential(Linear(3,3),_,BatchNorm1d(2))"])
def test_the_script_of_a_state_dict_writes_the_same(cli: Cli, wrapper: str) -> None:
    torch.save({"a.weight": torch.randn(3, 3), "b.weight": torch.randn(2, 3), "b.bias": torch.randn(2)}, "a.pth")
    words = ("-e", f"wrap * {wrapper}", "-e", f"wrap a.0 {wrapper} --expect 1")
    cli("apply", "-m", "a.pth", *words, "-o", "b.pth")
    run(cli("script", "-m", "a.pth", *words, "-o", "c.pth").out)
    found, expected = (torch.load(name, weights_only=True) for name in ("b.pth", "c.pth"))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_key_that_starts_with_a_dot_is_not_moved(cli: Cli) -> None:
    torch.save({"..": torch.ones(2), "a.w": torch.ones(3), "s": torch.eye(2).to_sparse()}, "a.pth")
    refused = cli("wrap", ".", "Sequential(_)", "-m", "a.pth", code=2).err
    assert "the key '..' starts with a dot, so it cannot move to 0" in refused
    assert "hint: rename the key first" in refused
    cli("wrap", "a", "Sequential(_)", "-m", "a.pth", "-o", "b.pth")
    assert list(torch.load("b.pth", weights_only=False)) == ["..", "a.0.w", "s"]


@pytest.mark.parametrize(
    "wrapper", [WEIGHT_NORM, "own:LoRA(_,r=2)", "Dropout(_)", "TransformerEncoder(_,2,enable_nested_tensor=False)"]
)
def test_a_wrapper_that_needs_more_than_keys_is_refused(cli: Cli, own: Any, wrapper: str) -> None:
    torch.save({"fc.weight": torch.randn(2, 3)}, "a.pth")
    failed = cli("wrap", "fc", wrapper, "-m", "a.pth", "-o", "b.pth", "--trust", code=2)
    assert "--arch names the architecture" in failed.err


# --- models of libraries ---------------------------------------------------------------------------------------------


def test_wrappers_on_a_vit_run_and_load(cli: Cli, own: Any) -> None:
    pytest.importorskip("timm")
    cli("save", "a.pth", "-m", "timm:test_vit")
    cli("wrap", "blocks.*.attn.qkv", "own:LoRA(_,r=2)", "-m", "a.pth", "-o", "b.pth", "--trust")
    model = modelcli.load("a.pth")
    found = modelcli.load("b.pth", trust=True).eval()
    size: Any = model.patch_embed.img_size
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert torch.equal(found(x), model.eval()(x))  # b is zero
    assert not found.blocks[0].attn.qkv.base.weight.requires_grad
    assert type(found.blocks[1].attn.qkv).__name__ == "LoRA"


def test_dropout_before_the_head_of_torchvision(cli: Cli) -> None:
    cli("wrap", "fc", "Sequential(Dropout(0.5),_)", "-m", "resnet18", "-o", "b.pth")
    found = modelcli.load("b.pth")
    assert [type(part).__name__ for part in found.fc.children()] == ["Dropout", "Linear"]
    assert found.fc[1].out_features == 1000

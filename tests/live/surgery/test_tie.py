"""tie and untie: compared with the assignments of plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modelcli
from modelcli.errors import RequestError
from tests import nets
from tests.conftest import Cli


def test_tie_is_an_assignment() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    old = model[0].weight
    modelcli.apply(model, "tie 0.weight 2.weight")
    assert model[2].weight is old
    assert model[0].weight is old


def test_all_names_of_a_tied_tensor_become_the_first() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    model[2].weight = model[1].weight
    modelcli.apply(model, "tie 0.weight 1.weight 3.weight")
    assert len({id(layer.weight) for layer in model}) == 1


def test_untie_gives_a_copy_and_keeps_the_flag() -> None:
    model = nets.Tied()
    model.embed.weight.requires_grad_(False)
    modelcli.apply(model, "untie head.weight")
    assert model.head.weight is not model.embed.weight
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()
    assert torch.equal(model.head.weight, model.embed.weight)
    assert not model.head.weight.requires_grad


def test_views_of_shared_bytes_are_separated() -> None:
    model = nn.Module()
    base = torch.arange(6.0)
    model.register_buffer("a", base[:4])
    model.register_buffer("b", base[2:])
    modelcli.apply(model, "untie b")
    assert torch.equal(model.b, base[2:])
    assert model.b.untyped_storage().data_ptr() != model.a.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tie 0.weight", "tie takes at least two names"),
        ("tie 0.weight 1.weight", "0.weight is float32 [4, 4] and 1.weight is float32 [4, 3]"),
        ("tie 0.weight 2.weight", "0.weight is float32 [4, 4] and 2.weight is bfloat16 [4, 4]"),
        ("tie 0.weight 0.weight", "0.weight are one tensor already"),
        ("tie 3.running_mean 3.weight", "3.running_mean is a buffer and 3.weight is a parameter"),
        ("tie 0.weight 9.weight", "no tensor matches '9.weight'"),
        ("untie 0.weight", "0.weight is tied to no other tensor"),
        ("untie", "untie takes at least one name"),
    ],
)
def test_what_is_refused(line: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 4).bfloat16(), nn.BatchNorm1d(4))
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, line)
    assert message in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("words", [("-m", "nets.py:Tied"), ("-m", "tied.pth")])
def test_untied_and_tied_again_in_files(cli: Cli, words: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    torch.save(nets.Tied().state_dict(), "tied.pth")
    assert "tied to embed.weight" in cli("untie", "head.weight", *words, "-o", "apart.pth").out
    apart = torch.load("apart.pth", weights_only=True)
    assert torch.equal(apart["head.weight"], apart["embed.weight"])
    assert apart["head.weight"].data_ptr() != apart["embed.weight"].data_ptr()
    told = cli("tie", "embed.weight", "head.weight", "-m", "apart.pth", "--trust", "-o", "again.pth")
    assert "the values of embed.weight are kept; those of head.weight are dropped" in told.err
    again = torch.load("again.pth", weights_only=True)
    assert again["head.weight"].data_ptr() == again["embed.weight"].data_ptr()
    assert list(again) == list(apart)
    loaded = modelcli.load("again.pth", trust=True) if words[1] == "nets.py:Tied" else None
    assert loaded is None or loaded.head.weight is loaded.embed.weight


def test_a_safetensors_file_holds_a_tied_tensor_once(cli: Cli) -> None:
    weights = {"a.weight": torch.randn(2, 2), "b.weight": torch.randn(2, 2)}
    save_file(weights, "a.safetensors")
    cli("tie", "a.weight", "b.weight", "-m", "a.safetensors", "-o", "b.safetensors")
    assert list(load_file("b.safetensors")) == ["a.weight"]


def test_tie_with_all_names_picked_keeps_the_first() -> None:
    model = nets.Tied()
    old = model.embed.weight
    modelcli.apply(model, "untie embed.weight head.weight")
    assert model.embed.weight is old
    assert model.head.weight is not old


@pytest.mark.parametrize("line", ["untie head.weight", "tie body.weight other.weight"])
@pytest.mark.parametrize("words", [("-m", "own.py:Net"), ("-m", "a.pth")])
def test_the_script_writes_the_same(cli: Cli, folder: Path, line: str, words: tuple[str, ...]) -> None:
    (folder / "own.py").write_text(
        "from torch import nn\nfrom nets import Tied\n\nclass Net(Tied):\n    def __init__(self):\n"
        "        super().__init__()\n        self.other = nn.Linear(4, 4)\n        self.other.requires_grad_(False)\n"
    )
    sys.path.insert(0, str(folder))
    from own import Net  # type: ignore[import-not-found]

    torch.save(Net().state_dict(), "a.pth")
    cli("apply", *words, "-e", line, "-o", "out.pth")
    (folder / "made.py").write_text(cli("script", *words, "-e", line, "-o", "by-script.pth").out)
    subprocess.run([sys.executable, "made.py"], check=True, cwd=folder, capture_output=True)
    one, other = (torch.load(name, weights_only=True) for name in ("out.pth", "by-script.pth"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    ties = [
        {name: t.data_ptr() == state["embed.weight"].data_ptr() for name, t in state.items()} for state in (one, other)
    ]
    assert ties[0] == ties[1]

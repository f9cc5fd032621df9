"""slice: compared with a new list of the children, and with a dict comprehension over the state dict."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import modelcli
from modelcli.errors import RequestError
from tests.conftest import Cli


def layers(count: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(3, 3) for _ in range(count))), "head": nn.Linear(3, 2)})


def storages(state: dict[str, torch.Tensor]) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in state.values()})


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("0-1", [0, 1]),
        ("3,2,1,0", [3, 2, 1, 0]),
        ("3-0", [3, 2, 1, 0]),
        ("0--2", [0, 1, 2]),
        ("-1", [3]),
        ("-- -2--1", [2, 3]),
        ("-2--1,0", [2, 3, 0]),
        ("0-2,1-3", [0, 1, 2, 1, 2, 3]),
        ("1,1,1", [1, 1, 1]),
    ],
)
def test_the_children_that_are_kept(words: str, kept: list[int]) -> None:
    model = layers()
    old = list(model["layers"])
    modelcli.apply(model, f"slice layers {words}")
    found = list(model["layers"])
    assert [str(number) for number in range(len(kept))] == list(model["layers"]._modules)
    for place, number in enumerate(kept):
        assert torch.equal(found[place].weight, old[number].weight)
        assert (found[place] is old[number]) == (number not in kept[:place])
    assert storages(dict(model["layers"].state_dict())) == 2 * len(kept)


def test_named_children_keep_their_names_and_cannot_be_repeated() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), act=nn.ReLU(), second=nn.Linear(2, 2)))
    modelcli.apply(model, "slice . 2,0")
    assert list(model._modules) == ["second", "first"]
    with pytest.raises(RequestError, match="first of the model would be there twice"):
        modelcli.apply(model, "slice . 1,1")


def test_tied_repeats_are_one_module() -> None:
    model = layers()
    modelcli.apply(model, "slice layers 0,1,0 --tied")
    assert model["layers"][0] is model["layers"][2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("slice layers 4", "4 is no position in layers, whose children are 0 to 3"),
        ("slice layers -5", "-5 is no position in layers, whose children are 0 to 3"),
        ("slice layers 1-x", "'1-x' is no position and no range"),
        ("slice layers ''", "'' is no position and no range"),
        ("slice layers 0-99999999999999999999", "is beyond the 100,000 children that a sequence may have"),
        ("slice layers", "slice takes one target and the positions to keep"),
        ("slice head 0", "head is a Linear"),
        ("slice '**' 0", "layers lies inside ., and both match"),
        ("slice 'l*' 0 --expect 2", "1 module matches, not the 2 expected"),
        ("slice . 0", "the model itself is a ModuleDict"),
        ("slice layers " + ",".join(["0-3"] * 30_000), "slice would make more than 100,000 children"),
    ],
)
def test_what_is_refused(line: str, message: str) -> None:
    model = layers()
    before = repr(model)
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, line)
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert repr(model) == before


def test_a_sequence_without_children_is_refused() -> None:
    with pytest.raises(RequestError, match="the model itself is a Sequential without children"):
        modelcli.apply(nn.Sequential(), "slice . 0")


def experts(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), "gate": nn.Linear(3, 3)})
        for _ in range(layers)
    )


def test_several_sequences_are_sliced_alike(cli: Cli) -> None:
    model = experts()
    torch.save(dict(model.state_dict()), "a.pth")
    done = cli("slice", "*.experts", "2,0,2", "-m", "a.pth", "-o", "b.pth", "--json").json
    assert [change["path"] for change in done["changes"]] == ["0.experts", "1.experts"]
    assert done["changes"][0]["before"] == "3 children"
    assert "child 1 left out" in done["notes"]
    old = deepcopy(model)
    modelcli.apply(model, "slice '*.experts' 2,0,2")
    for number in range(2):
        weights = [old.get_submodule(f"{number}.experts.{at}").weight for at in (2, 0, 2)]
        for place, weight in enumerate(weights):
            assert torch.equal(model.get_submodule(f"{number}.experts.{place}").weight, weight)
    found = torch.load("b.pth", weights_only=True)
    assert sorted(found) == sorted(model.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert storages(found) == len(found)


def test_a_shared_sequence_is_sliced_once() -> None:
    one = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.ModuleDict({"a": one, "b": one})
    modelcli.apply(model, "slice '*' 0-1")
    assert model["a"] is model["b"]
    assert len(model["a"]) == 2


def test_sequences_that_lose_other_positions_have_one_note(cli: Cli) -> None:
    state = {f"{name}.{n}.w": torch.zeros(1) for name, size in (("a", 2), ("b", 4)) for n in range(size)}
    torch.save(state, "a.pth")
    assert "the sequences lose 1 to 3 children each" in cli("slice", "*", "0", "-m", "a.pth").err


# --- files that record no architecture -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kept", [(0, 1, 2, 1, 2, 3), (3, 0), (2,)])
def test_a_state_dict_equals_a_comprehension(cli: Cli, suffix: str, kept: tuple[int, ...]) -> None:
    state = dict(layers().state_dict())
    save_file(state, "a.safetensors") if suffix == "safetensors" else torch.save(state, "a.pth")
    cli("slice", "layers", ",".join(map(str, kept)), "-m", f"a.{suffix}", "-o", f"b.{suffix}")
    found = load_file("b.safetensors") if suffix == "safetensors" else torch.load("b.pth", weights_only=True)
    expected = {
        f"layers.{place}.{name}": state[f"layers.{number}.{name}"]
        for place, number in enumerate(kept)
        for name in ("weight", "bias")
    } | {name: state[name] for name in ("head.weight", "head.bias")}
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert storages(found) == len(found)
    loaded = torch.load("b.pth", weights_only=True, mmap=True) if suffix == "pth" else found
    assert storages(loaded) == len(found)


def test_ties_inside_a_repeated_child_stay_and_it_is_tied_to_nothing_else(cli: Cli) -> None:
    state: dict[str, torch.Tensor] = {}
    for number in range(2):
        state[f"layers.{number}.a"] = torch.randn(2)
        state[f"layers.{number}.b"] = state[f"layers.{number}.a"]
    torch.save(state, "a.pth")
    cli("slice", "layers", "0,1,0", "-m", "a.pth", "-o", "b.pth")
    found = torch.load("b.pth", weights_only=True)
    assert storages(found) == 3
    assert found["layers.2.a"].data_ptr() == found["layers.2.b"].data_ptr()


def test_modules_without_tensors_keep_their_numbers(cli: Cli) -> None:
    """A file does not show the ReLUs of a Sequential, and the numbers mean the same as in the model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    torch.save(model.state_dict(), "a.pth")
    cli("slice", ".", "0-2", "-m", "a.pth", "-o", "b.pth")
    expected = nn.Sequential(*list(model)[:3]).state_dict()
    found = torch.load("b.pth", weights_only=True)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "lines",
    [("slice layers 0,2",), ("slice layers 1,0,1",), ("slice layers 0-3,2-3", "cast . half"), ("slice 'laye*' 3,1",)],
)
@pytest.mark.parametrize("words", [("-m", "a.pth"), ("-m", "own.py:Net"), ("-m", "a.pth", "--arch", "own.py:Net")])
def test_the_script_writes_the_same(cli: Cli, folder: Path, lines: tuple[str, ...], words: tuple[str, ...]) -> None:
    (folder / "own.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))\n"
        "        self.head = nn.Linear(3, 2)\n"
    )
    torch.save(dict(layers().state_dict()), "a.pth")
    edits = [word for line in lines for word in ("-e", line)]
    cli("apply", *words, *edits, "-o", "out.pth", "--check", "none")
    (folder / "made.py").write_text(cli("script", *words, *edits, "-o", "by-script.pth").out)
    subprocess.run([sys.executable, "made.py"], check=True, cwd=folder, capture_output=True)
    one, other = (torch.load(name, weights_only=True) for name in ("out.pth", "by-script.pth"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- round trips ---------------------------------------------------------------------------------------------------


@given(st.permutations(range(5)))
@settings(max_examples=20, deadline=None)
def test_an_order_and_its_inverse_give_the_first_model_back(order: list[int]) -> None:
    model = layers(5)
    expected = deepcopy(model)
    inverse = [order.index(number) for number in range(5)]
    for numbers in (order, inverse):
        modelcli.apply(model, f"slice layers {','.join(map(str, numbers))}")
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    x = torch.randn(2, 3)
    assert torch.equal(model["layers"](x), expected["layers"](x))


# --- models of libraries -------------------------------------------------------------------------------------------


def test_half_the_layers_of_a_vit_run(cli: Cli) -> None:
    from torchvision.models import vit_b_16

    cli("slice", "encoder.layers", "0,2,4", "-m", "vit_b_16", "-o", "out.pth", "--check", "none")
    loaded = modelcli.load("out.pth")
    torch.manual_seed(0)
    expected = vit_b_16()
    kept = [expected.encoder.layers[number] for number in (0, 2, 4)]
    assert [torch.equal(a.ln_1.weight, b.ln_1.weight) for a, b in zip(loaded.encoder.layers, kept, strict=True)]
    assert torch.equal(loaded.encoder.layers[1].mlp[0].weight, kept[1].mlp[0].weight)


@pytest.mark.parametrize(("words", "kept"), [("0-2,1-3", (0, 1, 2, 1, 2, 3)), ("3,0", (3, 0))])
def test_a_llama_with_other_layers_is_what_transformers_loads(cli: Cli, words: str, kept: tuple[int, ...]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=4, vocab_size=50, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained("llama")
    assert (
        f"num_hidden_layers: 4 -> {len(kept)}" in cli("slice", "model.layers", words, "-m", "./llama", "-o", "o/").err
    )
    found, loading = LlamaForCausalLM.from_pretrained("o", output_loading_info=True)
    assert not any(loading.values())
    model.model.layers = nn.ModuleList(deepcopy(model.model.layers[number]) for number in kept)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(kept)
    x = torch.arange(6)[None]
    assert torch.equal(found.eval()(x).logits, model(x).logits)
    assert torch.equal(modelcli.load("o/").eval()(x).logits, model(x).logits)

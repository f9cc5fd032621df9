"""`--check same`: the edited model gives the outputs of the unedited one, or nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelcli
from modelcli.errors import RequestError
from tests.conftest import Cli

OWN = '''
import torch
from torch import nn

class Tokens(nn.Module):
    """An embedding, three residual layers and a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids):
        x = self.tok(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return {"logits": self.head(x), "hidden": [x], "length": ids.shape[1]}

class Noisy(nn.Module):
    """A random number in each pass, and a Dropout."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.fc(x)) + torch.randn(4)

class Detecting(nn.Module):
    """A body, and a head that finds nothing, as a detection model does with random weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.head(self.body(x))
        return [{"boxes": x[x > 1e9].reshape(-1, 4)}]

class Outputs(nn.Module):
    """An output that shows nothing, or little, of what the layer computes."""

    def __init__(self, kind):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x):
        x = nn.functional.linear(x, self.fc.weight)
        if self.kind == "nan":
            return x / 0 * 0
        if self.kind == "zeros":
            return x * 0
        if self.kind == "nothing":
            return []
        if self.kind == "fails":
            raise ValueError("no such input")
        return torch.cat([x, torch.tensor([[float("nan"), float("inf")]])], dim=1)
'''

SAME = ("--check", "same")


@pytest.fixture
def own(folder: Path) -> Path:
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    return folder


def compared(cli: Cli, *words: object) -> Any:
    return cli(*words, *SAME, "--json").json["check"]["same"]


def refused(cli: Cli, *words: object, code: int = 2) -> str:
    """The error of a command that is refused and has written nothing."""
    before = set(Path().iterdir())
    error = cli(*words, *SAME, "-o", "refused.pth", code=code).err
    assert set(Path().iterdir()) == before
    return error


TOKENS = ("-m", "own.py:Tokens", "--input", "ids=2,6:int64")


@pytest.mark.parametrize(
    "words",
    [
        ("freeze", "tok"),
        ("untie", "head.weight"),
        ("slice", "layers", "0-2"),
        ("wrap", "layers.1", "Sequential(_,Identity())"),
        ("apply", "-e", "slice layers 2,0,1", "-e", "slice layers 1,2,0"),
        ("apply", "-e", "append layers Linear(8,8)", "-e", "slice layers 0-2"),
    ],
)
@pytest.mark.usefixtures("own")
def test_edits_that_keep_the_outputs_pass(cli: Cli, words: tuple[str, ...]) -> None:
    done = cli(*words, *TOKENS, *SAME, "-o", "out.pth", "--json").json["check"]
    assert done["ran"]
    assert done["same"]["bit_for_bit"]
    assert done["same"]["max_abs_diff"] == 0.0
    names = {output["name"]: (output["shape"], output["dtype"]) for output in done["same"]["outputs"]}
    assert names == {"logits": ([2, 6, 50], "float32"), "hidden.0": ([2, 6, 8], "float32")}
    assert Path("out.pth").exists()


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (("slice", "layers", "0,2"), "layers.1 Linear"),
        (("slice", "layers", "0,2,1"), "layers.1 Linear"),
        (("init", "layers.2", "zeros"), "layers.2 Linear"),
        (("replace", "layers.0", "Linear(8,8)"), "layers.0 Linear"),
        (("apply", "-e", "freeze tok", "-e", "init layers.1.bias zeros"), "layers.1 Linear"),
    ],
)
@pytest.mark.usefixtures("own")
def test_edits_that_change_outputs_are_refused_and_name_the_first_module(
    cli: Cli, words: tuple[str, ...], first: str
) -> None:
    error = refused(cli, *words, *TOKENS)
    assert "the edited model does not give the outputs of the unedited one: output " in error
    assert f"; {first} is the first module with another output" in error
    assert "hint: leave --check same out if the edit is meant to change what the model computes" in error
    cli(*words, *TOKENS, "-o", "without.pth")  # the hint


def test_the_difference_is_that_of_plain_pytorch(cli: Cli, own: Path) -> None:
    cli("freeze", "tok", *TOKENS, "-o", "a.pth")
    error = refused(cli, "init", "layers.2.weight", "zeros", "-m", "a.pth", "--trust")
    model = modelcli.load("a.pth", trust=True).eval()
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 6))  # drawn as the check draws them, because the model looks rows up
    with torch.no_grad():
        before = model(ids)
        model.layers[2].weight.fill_(0)
        after = model(ids)
    differences = {name: float((before[name].double() - after[name].double()).abs().max()) for name in ["logits"]}
    differences["hidden.0"] = float((before["hidden"][0].double() - after["hidden"][0].double()).abs().max())
    name = max(differences, key=lambda key: differences[key])
    largest = before["logits"] if name == "logits" else before["hidden"][0]
    tolerance = 1e-5 * float(largest.abs().max())
    assert f"output {name} differs by up to {differences[name]:.3g}, and {tolerance:.2g} is allowed" in error


@pytest.mark.usefixtures("own")
def test_token_ids_are_drawn_from_all_rows(cli: Cli) -> None:
    """With zeros as ids, a change of any other row of the embedding would not be seen."""
    (Path("rows.py")).write_text(
        "import torch\nfrom torch import nn\nclass M(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.tok = nn.Embedding(3, 4)\n"
        "        self.ones = nn.Embedding(3, 4)\n        nn.init.ones_(self.ones.weight)\n"
        "        self.tok.weight.data[0] = 1\n"
        "    def forward(self, ids):\n        return self.tok(ids)\n",
        encoding="utf-8",
    )
    words = ("-m", "rows.py:M", "--input", "ids=2,9:int64")
    assert "tok Embedding is the first" in refused(cli, "init", "tok", "ones", *words)


@pytest.mark.usefixtures("own")
def test_an_input_that_cannot_be_drawn_is_zeros_and_a_note_says_so(cli: Cli) -> None:
    Path("pair.py").write_text(
        "import torch\nfrom torch import nn\nclass M(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.tok = nn.Embedding(9, 4)\n"
        "        self.end = nn.Embedding(9, 4)\n"
        "    def forward(self, ids, ends):\n"
        "        if ends.max() > 0:\n            raise ValueError('ends come after the text')\n"
        "        return self.tok(ids) + self.end(ends)\n",
        encoding="utf-8",
    )
    words = ("-m", "pair.py:M", "--input", "ids=2,9:int64", "--input", "ends=2,9:int64")
    note = "note: the model does not run with drawn indices for ends, so the check looked at row 0 of their tables"
    assert note in cli("freeze", ".", *words, *SAME).err
    assert "tok Embedding is the first" in refused(cli, "init", "tok", "zeros", *words)


@pytest.mark.usefixtures("own")
def test_differences_within_the_tolerance_are_told(cli: Cli) -> None:
    words = ("-m", "Sequential(Linear(8,8),BatchNorm1d(8))", "--input-size", "4,8")
    error = refused(cli, "apply", "-e", "cast . bfloat16", "-e", "cast . float32", *words)
    assert "the output differs by up to" in error
    shown = cli("set", "1", "eps=1.5e-5", *words, *SAME).out  # 2.5e-6 of each value
    found = re.search(r"outputs: +those of the unedited model, largest difference (.*) \((.*) is allowed\)", shown)
    assert found is not None
    assert 0 < float(found[1]) < float(found[2])
    same = compared(cli, "set", "1", "eps=1.5e-5", *words)
    assert not same["bit_for_bit"]
    assert 0 < same["max_abs_diff"] <= same["outputs"][0]["tolerance"]
    assert "the output differs" in refused(cli, "set", "1", "eps=5e-5", *words)  # 2e-5 of each value
    assert "equal bit for bit" in cli("freeze", "0", *words, *SAME).out


@pytest.mark.usefixtures("own")
def test_another_shape_dtype_or_input_is_a_difference(cli: Cli) -> None:
    words = ("-m", "Sequential(Linear(4,4),Linear(4,3))", "--input-size", "2,4")
    assert "the output was float32[2,3] and is float32[2,5]" in refused(cli, "replace", "1", "Linear(4,5)", *words)
    casts = "takes float32[2,4] before the edit, and bfloat16[2,4] after the edit"
    assert casts in refused(cli, "cast", ".", "bfloat16", *words)
    inner = ("-m", "Sequential(Linear(4,8),Sequential(Linear(8,3)))", "--input-size", "2,4")
    assert "float32[2,4] before the edit, and float32[2,8] after the edit" in refused(cli, "extract", "1", *inner)


def test_random_numbers_in_forward_are_the_same_in_both_passes(cli: Cli, own: Path) -> None:
    words = ("-m", "own.py:Noisy", "--input-size", "3,4")
    assert compared(cli, "freeze", "fc", *words)["bit_for_bit"]
    assert compared(cli, "replace", "drop", "Dropout(0.9)", *words)["bit_for_bit"]  # eval mode


@pytest.mark.usefixtures("own")
def test_an_output_that_shows_nothing_does_not_pass(cli: Cli) -> None:
    def words(kind: str) -> tuple[str, ...]:
        return ("freeze", "fc", "-m", f"own.py:Outputs(kind='{kind}')", "--input-size", "1,4")

    for kind in ("nan", "zeros"):
        assert "has no number but NaN and 0, before and after, so it shows nothing" in refused(cli, *words(kind))
    assert "has no values, before and after" in refused(cli, *words("nothing"))
    assert "nothing to compare with: before the edit" in refused(cli, *words("fails"))
    shown = cli(*words("partly"), *SAME)
    assert "equal bit for bit" in shown.out
    assert "note: NaN in 1 place of the output counts as equal, because both models have it" in shown.err


@pytest.mark.usefixtures("own")
def test_where_the_output_shows_nothing_the_children_are_compared(cli: Cli) -> None:
    words = ("-m", "own.py:Detecting", "--input-size", "2,4")
    done = cli("wrap", "body.0", "Sequential(_,Identity())", *words, *SAME, "--json").json
    assert [output["name"] for output in done["check"]["same"]["outputs"]] == ["body", "head"]
    assert any("the output shows nothing, so the check compared the outputs of body, head" in n for n in done["notes"])
    error = refused(cli, "init", "head", "zeros", *words)
    assert "the unedited one: in head, the output differs by up to" in error
    assert "head Linear is the first module with another output" in error


@pytest.mark.usefixtures("own")
def test_nan_on_one_side_is_a_difference(cli: Cli) -> None:
    torch.save({"0.weight": torch.full((4, 4), float("nan")), "0.bias": torch.ones(4)}, "nan.pth")
    source = ("-m", "nan.pth", "--arch", "Sequential(Linear(4,4))", "--input-size", "1,4")
    error = refused(cli, "init", "0", "ones", *source)
    assert "has NaN in 4 places before and in 0 places after" in error


def test_what_cannot_run_is_refused_and_says_what_to_do(cli: Cli, own: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 3)).state_dict(), "bare.pth")
    error = refused(cli, "freeze", "0", "-m", "bare.pth")
    assert "bare.pth records no architecture: only its keys are known" in error
    assert "hint: --arch REFERENCE names it" in error
    words = ("-m", "bare.pth", "--arch", "Sequential(Linear(4,3))")
    error = refused(cli, "freeze", "0", *words)
    assert "their input is not known" in error
    assert "pass --input-size, batch included" in error
    assert compared(cli, "freeze", "0", *words, "--input-size", "2,4")["bit_for_bit"]
    error = refused(cli, "replace", "0", "Linear(5,3)", *words, "--input-size", "2,4")
    assert "0 Linear(5, 3) does not fit: [2,4] float32 flows in" in error


# --- edits of keys ---------------------------------------------------------------------------------------------------


KEY_EDITS = [
    ("permute 0.weight 1,0", "permute 0.weight 1,0"),
    ("rename '0.*' 'stem.*'", "rename 'stem.*' '0.*'"),
    ("split 0.weight a b", "concat a b 0.weight"),
    ("unstack 0.weight 'rows.*'", "stack 'rows.*' 0.weight"),
    ("reshape 0.weight 16", "reshape 0.weight 4,4"),
]


@pytest.mark.parametrize("pair", KEY_EDITS)
@pytest.mark.parametrize("bare", [False, True])
def test_an_edit_of_keys_and_its_inverse(cli: Cli, pair: tuple[str, str], bare: bool) -> None:
    """The keys run in the architecture that the file records, or that --arch names."""
    model = "Sequential(Linear(4,4),ReLU(),Linear(4,3))"
    words: tuple[object, ...] = ("-m", "a.pth", "--bare-keys")
    if bare:
        torch.save(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).state_dict(), "a.pth")
        words = (*words, "--arch", model, "--input-size", "2,4")
    else:
        cli("freeze", "0", "-m", model, "--input-size", "2,4", "-o", "a.pth")
    first, second = pair
    shown = cli("apply", "-e", first, "-e", second, *words, *SAME, "-o", "out.pth", "--json").json
    assert shown["check"]["same"]["bit_for_bit"]
    assert shown["check"]["input"] == [[2, 4]]
    before, after = (torch.load(name, weights_only=True) for name in ("a.pth", "out.pth"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    error = refused(cli, "apply", "-e", first, *words)
    if first.startswith("permute"):
        assert "the output differs by up to" in error
        assert "0 Linear is the first module" in error
    else:
        assert "they do not fit after the edit: a.pth does not fit" in error
        assert "hint: --check none writes the keys" in error
    cli("apply", "-e", first, *words, "--check", "none", "-o", "hinted.pth")


def test_keys_that_do_not_fit_before_the_edit_are_refused(cli: Cli) -> None:
    torch.save({"w": torch.ones(3, 4)}, "a.pth")
    words = ("-m", "a.pth", "--bare-keys", "--arch", "Sequential(Linear(4,3))", "--input-size", "2,4")
    assert "they do not fit before the edit: a.pth does not fit" in refused(cli, "rename", "w", "0.weight", *words)


def test_key_edits_of_a_recipe_are_part_of_the_unedited_model(cli: Cli) -> None:
    model = "Sequential(Linear(4,4))"
    torch.save(nn.Sequential(nn.Linear(4, 4)).state_dict(), "a.pth")
    Path("modelcli.toml").write_text(
        f'model = "a.pth"\narch = "{model}"\nbare_keys = true\ninput_size = "2,4"\nedits = ["permute 0.weight 1,0"]\n',
        encoding="utf-8",
    )
    cli("cast", "0", "float32", *SAME)  # leaves the values
    assert "the output differs" in cli("permute", "0.weight", "1,0", *SAME, code=2).err
    assert "permute 0.weight 1,0" not in Path("modelcli.toml").read_text(encoding="utf-8").partition("cast")[2]


# --- everywhere that edits are made ----------------------------------------------------------------------------------


def test_the_working_recipe_compares_with_its_own_edits_made(cli: Cli, own: Path) -> None:
    cli("load", "Sequential(Linear(4,4),Linear(4,4))", "--input-size", "2,4")
    cli("init", "0", "zeros")
    assert compared(cli, "wrap", "1", "Sequential(_,Identity())")["bit_for_bit"]
    before = Path("modelcli.toml").read_text(encoding="utf-8")
    assert "1.0 Linear is the first module" in cli("init", "1", "zeros", *SAME, code=2).err
    assert Path("modelcli.toml").read_text(encoding="utf-8") == before
    assert "0 Linear is the first module" in cli("save", "out.pth", *SAME, code=2).err  # all edits of the recipe
    assert not Path("out.pth").exists()
    cli("undo", "2")
    cli("wrap", "1", "Sequential(_,Identity())")
    assert cli("save", "out.pth", *SAME, "--json").json["check"]["same"]["bit_for_bit"]


def test_adapt_and_a_recipe_file_are_checked(cli: Cli) -> None:
    error = refused(cli, "adapt", "--classes", 5, "-m", "resnet18", "--input-size", "1,3,32,32")
    assert "the output was float32[1,1000] and is float32[1,5]" in error
    Path("edits.toml").write_text('edits = ["freeze 0", "wrap 1 Sequential(_,Identity())"]\n', encoding="utf-8")
    words = ("apply", "edits.toml", "-m", "Sequential(Linear(4,4),Linear(4,4))", "--input-size", "2,4")
    assert compared(cli, *words)["bit_for_bit"]
    assert refused(cli, *words, "-e", "init 0 zeros")


def test_torchvision_head_wrapped(cli: Cli) -> None:
    words = ("wrap", "fc", "Sequential(_,Identity())", "-m", "resnet18", "--input-size", "1,3,32,32")
    cli(*words, *SAME, "-o", "a.pth")
    import torchvision

    torch.manual_seed(0)
    plain = torchvision.models.resnet18().eval()
    image = torch.ones(1, 3, 32, 32)
    assert torch.equal(modelcli.load("a.pth").eval()(image), plain(image))
    assert compared(cli, "wrap", "layer1.0.relu", "Sequential(_)", "-m", "a.pth")["bit_for_bit"]


def test_timm_and_transformers(cli: Cli) -> None:
    pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    vit = ("-m", "timm:test_vit")
    assert compared(cli, "wrap", "blocks.0.mlp", "Sequential(Identity(),_)", *vit)["bit_for_bit"]
    blocks = refused(cli, "slice", "blocks", "0-4", *vit)
    assert "blocks.5" not in blocks
    assert "is the first module with another output" in blocks
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    llama = ("-m", "./llama")
    same = compared(cli, "wrap", "model.layers.0.mlp", "Sequential(_)", *llama)
    assert same["bit_for_bit"]
    assert "logits" in {output["name"] for output in same["outputs"]}
    assert compared(cli, "slice", "model.layers", "0-1", *llama)["bit_for_bit"]
    assert "model.norm LlamaRMSNorm is the first" in refused(cli, "slice", "model.layers", "0", *llama)


# --- Python ----------------------------------------------------------------------------------------------------------


def test_apply_in_python_keeps_the_model_where_outputs_differ() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    before, weight = {key: value.clone() for key, value in model.state_dict().items()}, model[0].weight
    with pytest.raises(RequestError, match=r"0 Linear is the first module with another output"):
        modelcli.apply(model, "init 0 zeros", "freeze 1", check="same", input_size=(2, 4))
    assert model[0].weight is weight
    assert model[1].weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == [True, True, False, True]
    edited = modelcli.apply(model, "wrap 0 Sequential(_,Identity())", check="same", input_size=(2, 4))
    assert edited is model
    assert isinstance(model[0], nn.Sequential)
    assert model[0][0].weight is weight
    assert [part.training for part in model.modules()] == [True, True, True, True, False, True]


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda: nn.Linear(4, 4), {"check": "same"}, "its input is not known"),
        (lambda: nn.Linear(4, 4), {"check": "run"}, "unknown check 'run'"),
        (lambda: nn.Linear(4, 4), {"check": "same", "input_size": (2, 5)}, "nothing to compare with"),
        (lambda: nn.Linear(4, 4, device="meta"), {"check": "same", "input_size": (2, 4)}, "meta device"),
    ],
)
def test_apply_in_python_refuses_what_it_cannot_compare(
    make: Callable[[], nn.Module], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        modelcli.apply(make(), "freeze .", **given)

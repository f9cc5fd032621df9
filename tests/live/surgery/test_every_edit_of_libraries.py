"""Every edit of a model of timm, of a folder of transformers, and of a model with a tied and a parametrized tensor.

The table of `test_every_edit.py` has every kind of child of a class of one's own. This one has models as the libraries
make them, and modules whose tensors are no plain parameters of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import modelcli
from modelcli import edits
from tests import nets
from tests.conftest import Cli
from tests.live.providers.huggingface import tiny
from tests.live.surgery.test_every_edit import (
    NEEDS_KEYS,
    NO_NORM,
    Cell,
    after,
    assert_same_state,
    drawn,
    flags,
    frozen_of,
    put,
    put_and_keep,
    run,
    tied,
)
from tests.sampling import rotated, sampled


def wrapped(path: str) -> Callable[[nn.Module], None]:
    return lambda model: model.set_submodule(path, nn.Sequential(model.get_submodule(path), nn.Dropout(0.5)))


def kept(path: str, *numbers: int) -> Callable[[nn.Module], None]:
    """Keep these children of a sequence; one that is named again is a copy."""

    def statements(model: nn.Module) -> None:
        holder: Any = model.get_submodule(path)
        made = [copy.deepcopy(holder[n]) if n in numbers[:place] else holder[n] for place, n in enumerate(numbers)]
        model.set_submodule(path, nn.Sequential(*made) if isinstance(holder, nn.Sequential) else nn.ModuleList(made))

    return statements


def reset(path: str) -> Callable[[nn.Module], None]:
    """Draw the default values of every layer below a path, in order."""

    def statements(model: nn.Module) -> None:
        for module in model.get_submodule(path).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    return drawn(statements)


def frozen_except(path: str) -> Callable[[nn.Module], None]:
    def statements(model: nn.Module) -> None:
        model.requires_grad_(False)
        model.get_submodule(path).requires_grad_(True)

    return statements


def refused(line: str) -> Cell:
    return Cell((line,), NEEDS_KEYS)


def edits_of(head: str, layers: str, norm: str, width: int) -> dict[str, Cell]:
    """Return an edit of each kind for a model with a classifier of this width and a sequence of blocks.

    `norm` is the path of a LayerNorm in each block.
    """
    first, second = (f"{layers}.{number}.{norm}" for number in (0, 1))
    return {
        "replace": Cell((f"replace {head} Linear(_,5)",), put(head, lambda: nn.Linear(width, 5))),
        "keep": Cell((f"replace {head} Linear(_,2) --keep-weights",), put_and_keep(head, lambda: nn.Linear(width, 2))),
        "wrap": Cell((f"wrap {head} Sequential(_,Dropout(0.5))",), wrapped(head)),
        "set": Cell((f"set {first} eps=0.001",), lambda model: setattr(model.get_submodule(first), "eps", 0.001)),
        "add": Cell(
            (f"add {head}.extra ReLU",), lambda model: model.get_submodule(head).add_module("extra", nn.ReLU())
        ),
        "remove": Cell((f"remove {layers}.1",), lambda model: model.get_submodule(layers).__delitem__(1)),
        "slice": Cell((f"slice {layers} 1,0,1",), kept(layers, 1, 0, 1)),
        "extract": Cell((f"extract {head}",), lambda model: model.get_submodule(head)),
        "rename": Cell((f"rename {head}.** end.**",), "cannot load a state dict"),
        "split": refused(f"split {head}.weight one two"),
        "concat": refused(f"concat {first}.weight {second}.weight both"),
        "stack": refused(f"stack {layers}.*.{norm}.weight both"),
        "unstack": refused(f"unstack {first}.weight {first}.weight.*"),
        "permute": refused(f"permute {head}.weight 1,0"),
        "reshape": refused(f"reshape {head}.weight -- -1"),
        "freeze": Cell((f"freeze {layers}",), flags(layers, first=False)),
        "unfreeze": Cell(("freeze .", f"unfreeze {head}"), frozen_except(head)),
        "init": Cell((f"init {layers}.0 default",), reset(f"{layers}.0")),
        "cast": Cell(("cast . float64",), lambda model: model.double() and None),
        "dequantize": Cell((f"dequantize {head} bfloat16",), "nothing to dequantize"),
        "tie": Cell((f"tie {first}.weight {second}.weight",), tied(first, second)),
        "untie": Cell((f"untie {head}.weight",), "is tied to no other"),
        "fuse": Cell((f"fuse {layers}",), NO_NORM.format(layers)),
    }


OF_TIMM = edits_of("head", "blocks", "norm1", 64) | {
    "insert": Cell(("insert blocks.1 Identity",), lambda model: model.blocks.insert(1, nn.Identity()) and None),
    "append": Cell(("append blocks Identity",), lambda model: model.blocks.append(nn.Identity()) and None),
}
OF_BERT = edits_of("classifier", "bert.encoder.layer", "output.LayerNorm", 32) | {
    "insert": Cell(("insert bert.encoder.layer.0 Identity",), "Identity cannot run after the edit"),
    "append": Cell(("append bert.encoder.layer Identity",), "Identity cannot run after the edit"),
}


def test_the_tables_have_every_edit() -> None:
    named = {line.split()[0] for table in (OF_TIMM, OF_BERT) for cell in table.values() for line in cell.lines}
    # The tests of adapt compare resize with the libraries, and those of graft have models of both as sources.
    assert named == set(edits.own_names()) - {"resize", "graft"}


@pytest.mark.parametrize("name", sampled([*OF_TIMM], 2))
def test_a_model_of_timm(cli: Cli, name: str) -> None:
    cell = OF_TIMM[name]
    torch.manual_seed(0)
    compare(cli, cell, ("-m", "timm:test_vit"), timm.create_model("test_vit"), (torch.randn(1, 3, 160, 160),))


@pytest.mark.parametrize(("name", "weights"), rotated([*OF_BERT], ["one file", "shards"]))
def test_a_folder_of_transformers(cli: Cli, name: str, weights: str) -> None:
    torch.manual_seed(0)
    model = tiny.model("BertForSequenceClassification")
    model.save_pretrained("bert", max_shard_size="20KB" if weights == "shards" else "5GB")
    assert (len(list(Path("bert").glob("*.safetensors"))) > 1) == (weights == "shards")
    compare(cli, OF_BERT[name], ("-m", "bert/"), tiny.loaded(Path("bert"))[0], (torch.arange(8)[None],))


def compare(cli: Cli, cell: Cell, words: tuple[str, ...], model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Require what plain statements do: tensors, flags, modules, and the outputs of the model that is loaded."""
    if isinstance(cell.on_model, str):
        run(cli, cell, *words, "-o", "out.pth", refusal=cell.on_model)
        assert not Path("out.pth").exists()
        return
    run(cli, cell, *words, "-o", "out.pth")
    expected = after(cell.on_model, model)
    assert_same_state(torch.load("out.pth", weights_only=True), expected.state_dict())
    loaded = modelcli.load("out.pth")
    assert frozen_of(loaded) == frozen_of(expected)
    assert [(path, type(part)) for path, part in loaded.named_modules()] == [
        (path, type(part)) for path, part in expected.named_modules()
    ]
    if isinstance(expected, nn.Linear):
        inputs = (torch.randn(2, expected.in_features),)
    dtype = next(expected.parameters()).dtype
    given = [value.to(dtype) if value.is_floating_point() else value for value in inputs]
    found, wanted = loaded.eval()(*given), expected.eval()(*given)
    if isinstance(wanted, transformers.utils.ModelOutput):
        found, wanted = found.logits, wanted.logits
    torch.testing.assert_close(found, wanted)  # the values lie elsewhere in memory


def test_a_wrapped_model_of_transformers_comes_out_as_a_folder(cli: Cli) -> None:
    """The library cannot build it from the configuration; the record beside the weights can."""
    model = tiny.saved("BertForSequenceClassification", Path("bert")).eval()
    done = cli("wrap", "classifier", "Sequential(_,Dropout(0.5))", "-m", "bert/", "-o", "out/")
    assert "config.json cannot say what classifier (Sequential in the place of Linear) is now" in done.err
    assert "classifier.0.weight" in load_file("out/model.safetensors")
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(modelcli.load("out/").eval()(tokens).logits, model(tokens).logits)


# --- tied and parametrized tensors -----------------------------------------------------------------------------------


def tied_and_normed() -> nn.Module:
    torch.manual_seed(0)
    return nets.TiedAndNormed()


TIED = "is tied to"
#: For each edit the lines and the plain statements, on the parametrized layer and on the tied embedding.
ON_PARTS: dict[tuple[str, str], Cell] = {
    ("replace", "parametrized"): Cell(("replace normed Linear(4,4)",), put("normed", lambda: nn.Linear(4, 4))),
    ("replace", "tied"): Cell(("replace embed Embedding(6,4)",), TIED),
    ("replace --untie", "tied"): Cell(
        ("replace embed Embedding(6,4) --untie",), put("embed", lambda: nn.Embedding(6, 4))
    ),
    ("wrap", "parametrized"): Cell(("wrap normed Sequential(_,Dropout(0.5))",), wrapped("normed")),
    ("wrap", "tied"): Cell(("wrap embed Sequential(_,Dropout(0.5))",), wrapped("embed")),
    ("remove", "parametrized"): Cell(("replace normed Identity",), put("normed", nn.Identity)),
    ("extract", "parametrized"): Cell(("extract normed",), lambda model: model.normed),
    ("extract", "tied"): Cell(("extract embed",), lambda model: model.embed),
    ("freeze", "parametrized"): Cell(("freeze normed",), flags("normed", first=False)),
    ("freeze", "tied"): Cell(("freeze embed",), flags("embed", first=False)),
    ("unfreeze", "parametrized"): Cell(("freeze .", "unfreeze normed"), frozen_except("normed")),
    ("unfreeze", "tied"): Cell(("freeze .", "unfreeze embed"), frozen_except("embed")),
    ("cast", "parametrized"): Cell(("cast . bfloat16",), lambda model: model.bfloat16() and None),
    ("init", "tied"): Cell(("init embed default",), reset("embed")),
    ("untie", "tied"): Cell(
        ("untie out.weight",),
        lambda model: setattr(model.out, "weight", nn.Parameter(model.out.weight.detach().clone())),
    ),
    ("tie", "tied"): Cell(("tie embed.weight out.weight",), "one tensor already"),
}


@pytest.mark.parametrize(("key", "source"), rotated([*ON_PARTS], ["own class", "modelcli checkpoint", "bare.pth"]))
def test_tied_and_parametrized_tensors(cli: Cli, folder: Path, key: tuple[str, str], source: str) -> None:
    cell = ON_PARTS[key]
    model = tied_and_normed()
    stated = ("--input-size", "1,3", "--input-dtype", "int64")
    words = {
        "own class": ("-m", "nets.py:TiedAndNormed", *stated),
        "modelcli checkpoint": ("-m", "made.pth", "--trust"),
        "bare.pth": ("-m", "bare.pth", "--arch", "nets.py:TiedAndNormed", *stated),
    }
    if source == "modelcli checkpoint":
        cli("save", "made.pth", "-m", "nets.py:TiedAndNormed", *stated)
    torch.save(model.state_dict(), "bare.pth")
    if isinstance(cell.on_model, str):
        run(cli, cell, *words[source], "-o", "out.pth", refusal=cell.on_model)
        return
    run(cli, cell, *words[source], "-o", "out.pth")
    expected = after(cell.on_model, model)
    assert_same_state(torch.load("out.pth", weights_only=True), expected.state_dict())
    loaded = modelcli.load("out.pth", trust=True)
    assert frozen_of(loaded) == frozen_of(expected)
    assert_same_state(loaded.state_dict(), expected.state_dict())
    tokens = torch.tensor([[1, 2, 5]])
    given = torch.randn(3, 4) if cell.lines == ("extract normed",) else tokens
    assert torch.equal(loaded.eval()(given), expected.eval()(given))

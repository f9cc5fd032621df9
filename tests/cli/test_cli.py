"""The commands as a user meets them: documents key by key, the recipe, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Cli

TOTALS = {"params", "trainable_params", "non_trainable_params", "buffers", "param_bytes", "buffer_bytes"}

# --- documents -----------------------------------------------------------------------------------------------------


def test_summary_document(cli: Cli) -> None:
    document = cli("summary", "nets.py:Unusual", "--input-size", "2,4", "--json").json
    assert {"schema", "model", "input", "layers", "totals"} <= document.keys()
    assert document["schema"] == 1
    assert document["model"] == {"reference": "nets.py:Unusual", "class": "Unusual"}
    assert document["input"] == [[2, 4]]
    layers = {layer["path"]: layer for layer in document["layers"]}
    keys = {"path", "type", "depth", "output_shape", "params", "trainable", "macs", "executed"}
    assert all(keys <= layer.keys() for layer in layers.values())
    assert layers["."]["output_shape"] == {"left": [2, 2], "right": [2, 3]}
    assert layers["blocks.1.0"] | {"shared_with": None} == {
        "path": "blocks.1.0",
        "type": "Linear",
        "depth": 3,
        "output_shape": [2, 4],
        "params": 20,
        "trainable": True,
        "macs": 32,
        "executed": True,
        "shared_with": None,
    }
    assert layers["spare"]["executed"] is False
    assert layers["first.act"]["trainable"] is None
    totals = document["totals"]
    assert TOTALS | {"macs", "input_bytes", "forward_backward_bytes", "total_bytes"} == totals.keys()
    parts = ("param_bytes", "buffer_bytes", "input_bytes", "forward_backward_bytes")
    assert totals["total_bytes"] == sum(totals[part] for part in parts)


def test_columns_add_up_to_the_totals(cli: Cli) -> None:
    layers = cli("summary", "vgg11", "--json").json
    parents = {path.rpartition(".")[0] for path in (layer["path"] for layer in layers["layers"])}
    leaves = [layer for layer in layers["layers"] if layer["path"] not in parents and layer["path"] != "."]
    assert sum(layer["params"] for layer in leaves) == layers["totals"]["params"]
    assert sum(layer["macs"] for layer in leaves) == layers["totals"]["macs"]


def test_not_called_is_marked(cli: Cli) -> None:
    lines = cli("summary", "nets.py:Unusual", "--input-size", "2,4").out.splitlines()
    assert "(not called)" in next(line for line in lines if line.startswith("spare"))


def test_depth(cli: Cli) -> None:
    document = cli("summary", "resnet18", "--depth", 1, "--json").json
    assert {layer["depth"] for layer in document["layers"]} == {0, 1}
    assert document["totals"]["params"] == 11_689_512


def test_params_document(cli: Cli) -> None:
    document = cli("params", "nets.py:Tied", "--json").json
    assert {"schema", "model", "tensors", "totals"} == document.keys()
    rows = {row["name"]: row for row in document["tensors"]}
    assert rows["head.weight"] == {
        "name": "head.weight",
        "shape": [11, 4],
        "dtype": "float32",
        "elements": 44,
        "bytes": 176,
        "kind": "parameter",
        "trainable": True,
        "tied_to": "embed.weight",
    }
    assert rows["positions"]["trainable"] is None
    assert rows["positions"]["persistent"] is False
    assert document["totals"]["params"] == 44 + 20
    assert document["totals"].keys() == TOTALS
    assert "tied to" in cli("params", "nets.py:Tied").out


def test_params_options(cli: Cli) -> None:
    def names(*words: object) -> list[str]:
        return [row["name"] for row in cli("params", "nets.py:Net", *words, "--json").json["tensors"]]

    assert names("-s", "conv1") == ["conv1.weight", "conv1.bias"]
    assert names("-s", "*.bias") == ["conv1.bias", "bn.bias"]
    assert names("--no-buffers", "-s", "bn") == ["bn.weight", "bn.bias"]
    assert names("--top", 2) == ["conv2.weight", "conv1.weight"]
    assert names("--sort", "elements", "--top", 1) == ["conv2.weight"]
    assert names("--sort", "name")[:2] == ["bn.bias", "bn.num_batches_tracked"]
    assert names("--frozen") == []
    assert names("--trainable", "-s", "conv2") == ["conv2.weight"]
    assert "cannot sort by 'size'" in cli("params", "nets.py:Net", "--sort", "size", code=2).err


def test_modules_document(cli: Cli) -> None:
    document = cli("modules", "nets.py:Net", "-s", "conv1", "--json").json
    assert {"schema", "model", "modules", "totals"} == document.keys()
    assert document["modules"] == [
        {
            "path": "conv1",
            "type": "Conv2d",
            "config": "1, 3, kernel_size=(1, 1), stride=(1, 1)",
            "params": 6,
            "trainable": True,
            "shared_with": None,
        }
    ]


def test_edits_document(cli: Cli) -> None:
    document = cli("replace", "fc", "Linear", 512, 10, "bias=False", "-m", "resnet18", "-o", "out.pth", "--json").json
    keys = {"schema", "model", "edits", "changes", "totals_before", "totals_after", "check", "output"}
    assert keys | {"notes"} == document.keys()
    assert document["notes"] == ["resnet18 was randomly initialised (--seed 0)"]
    assert document["edits"] == ["replace fc Linear(512,10,bias=False)"]
    assert document["changes"] == [
        {
            "path": "fc",
            "action": "replace",
            "before": "Linear(512, 1000)",
            "after": "Linear(512, 10, bias=False)",
            "params_before": 513_000,
            "params_after": 5120,
        }
    ]
    assert document["totals_before"]["params"] - document["totals_after"]["params"] == 513_000 - 5120
    assert {"ran", "reason", "output_shape"} <= document["check"].keys()
    assert document["output"] == "out.pth"


def test_load_save_and_log_documents(cli: Cli) -> None:
    document = cli("load", "nets.py:Net", "--json").json
    assert document == {
        "schema": 1,
        "model": {"reference": "nets.py:Net", "class": "Net"},
        "matched": 9,
        "missing": [],
        "unexpected": [],
        "mismatched": [],
    }
    cli("freeze", "bn")
    document = cli("save", "out.pth", "--json").json
    assert {key: document[key] for key in ("schema", "output", "format", "tensors", "params", "bytes")} == {
        "schema": 1,
        "output": "out.pth",
        "format": "pth",
        "tensors": 9,
        "params": 27,
        "bytes": Path("out.pth").stat().st_size,
    }
    document = cli("log", "--json").json
    assert {"schema", "recipe", "model", "edits"} <= document.keys()
    assert (document["recipe"], document["edits"]) == ("modelcli.toml", ["freeze bn"])


def test_the_table_of_mismatched_keys_has_a_limited_length(cli: Cli) -> None:
    cli("save", "many.pth", "-m", f"Sequential({', '.join(['Linear(1,1)'] * 30)})")
    words = ("load", "many.pth", "--arch", "Sequential(Linear(1,2))")
    table = cli(*words, code=1).out
    assert (table.count(" unexpected "), table.count(" mismatched ")) == (20, 2)
    assert "unexpected: 58 (20 above, and 38 more: --json shows all)\nmismatched: 2\n" in table
    assert len(cli(*words, "--json", code=1).json["unexpected"]) == 58
    for kind in ("csv", "markdown"):
        assert cli(*words, "-f", kind, code=1).out.count("unexpected") == 58


def test_errors_document(cli: Cli) -> None:
    error = cli("summary", "alexnt", "-f", "json", code=2).error
    assert error == {
        "kind": "request",
        "message": "no model is called 'alexnt': no builder, no class of torch.nn",
        "hint": "did you mean alexnet? modelcli list shows them all",
        "exit_code": 2,
    }
    assert cli("summary", "--nonsense", "--json", code=2).error["kind"] == "usage"


@pytest.mark.parametrize(
    "words", ["-qf json", "-qfjson", "-fjson", "-f json", "--format=json", "--format json", "--json", "-qqf json"]
)
def test_an_error_is_json_however_json_is_requested(cli: Cli, words: str) -> None:
    assert cli("params", "missing.pth", *words.split(), code=2).error["exit_code"] == 2
    assert cli("params", *words.split(), "--nonsense", code=2).error["kind"] == "usage"


def test_csv_and_markdown(cli: Cli) -> None:
    lines = cli("params", "nets.py:MyLinear(3,2)", "-f", "csv").out.splitlines()
    assert lines == [
        "name,shape,dtype,elements,bytes,kind,trainable",
        'W,"[2,3]",float32,6,24,parameter,true',
        "b,[2],float32,2,8,parameter,true",
    ]
    lines = cli("modules", "nets.py:MyLinear(3,2)", "--format", "markdown").out.splitlines()
    assert lines[0] == "| path | type | configuration | params | trainable |"
    assert lines[2] == "| . | MyLinear | - | 8 | yes |"
    assert "did you mean json?" in cli("params", "nets.py:Net", "-f", "jsn", code=2).err


def test_tree(cli: Cli) -> None:
    lines = cli("modules", "nets.py:Unusual", "--tree").out.splitlines()
    assert lines[0].startswith(".  Unusual()")
    assert "├── first  Sequential()  20" in lines
    assert "│   ├── lin  Linear(in_features=4, out_features=4, bias=True)  20" in lines
    assert any("(same as first.lin)" in line for line in lines)
    assert cli("modules", "nets.py:Unusual", "--tree", "--depth", 1).out.count("\n") == 6


def test_quiet(cli: Cli) -> None:
    words = ("save", "out.pth", "-m", "nets.py:Net", "--force")
    assert "randomly initialised (--seed 0)" in cli(*words).err
    assert cli(*words, "--quiet").err == ""


# --- the recipe ----------------------------------------------------------------------------------------------------


def test_the_working_recipe(cli: Cli, folder: Path) -> None:
    cli("load", "nets.py:Net", "--input-size", "1,1,4,4", "--seed", 3)
    cli("replace", "conv2", "Conv2d", "_", 7, 1)
    cli("freeze", "bn", "conv1")
    text = (folder / "modelcli.toml").read_text()
    assert text == (
        'model = "nets.py:Net"\nseed = 3\ninput_size = "1,1,4,4"\nedits = [\n'
        '    "replace conv2 Conv2d(_,7,1)",\n    "freeze bn conv1",\n]\n'
    )
    assert cli("summary", "--json").json["layers"][-1]["output_shape"] == [1, 7, 4, 4]
    result = cli("undo")
    assert "undid: freeze bn conv1" in result.err
    cli("replace", "conv1", "Conv2d(1,3,3)", "-o", "both.pth")
    assert cli("log", "--json").json["edits"][-1] == "replace conv1 Conv2d(1,3,3)"
    assert torch.load("both.pth", weights_only=True)["conv2.weight"].shape == (7, 3, 1, 1)


def test_undo(cli: Cli) -> None:
    cli("load", "nets.py:Net")
    for target in ("conv1", "bn", "conv2"):
        cli("freeze", target)
    assert "has 3 edits to undo, not 4" in cli("undo", 4, code=2).err
    cli("undo", 2, "--dry-run")
    assert len(cli("log", "--json").json["edits"]) == 3
    cli("undo", 2)
    assert cli("log", "--json").json["edits"] == ["freeze conv1"]
    cli("undo")
    assert "has no edits to undo" in cli("undo", code=2).err


def test_an_edit_is_checked_before_it_is_recorded(cli: Cli, folder: Path) -> None:
    cli("load", "alexnet")
    before = (folder / "modelcli.toml").read_text()
    cli("replace", "classifier.6", "Linear(4095,10)", code=2)
    cli("freeze", "featurs", code=2)
    cli("freeze", "features", "--dry-run")
    cli("freeze", "features", "-o", "nowhere.txt", code=2)
    assert (folder / "modelcli.toml").read_text() == before


def test_load_over_edits_needs_force(cli: Cli) -> None:
    cli("load", "nets.py:Net")
    cli("load", "alexnet")  # no edits: nothing is lost
    cli("freeze", "features")
    assert "modelcli.toml has 1 edit" in cli("load", "nets.py:Net", code=2).err
    cli("load", "nets.py:Net", "--dry-run")
    assert cli("log", "--json").json["model"]["reference"] == "alexnet"
    cli("load", "nets.py:Net", "--force")
    assert cli("log", "--json").json["edits"] == []


def test_another_recipe(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("load", "nets.py:Net", "--recipe", "runs/one.toml")
    assert 'model = "../nets.py:Net"' in (folder / "runs/one.toml").read_text()
    cli("freeze", "bn", "--recipe", "runs/one.toml")
    monkeypatch.setenv("MODELCLI_RECIPE", "runs/one.toml")
    assert cli("log", "--json").json["edits"] == ["freeze bn"]
    monkeypatch.chdir(folder / "runs")
    assert cli("modules", "--recipe", "one.toml", "--json").json["model"]["class"] == "Net"


def test_the_model_is_found_in_order(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("load", "nets.py:Net")
    assert cli("modules", "--json").json["model"]["class"] == "Net"
    monkeypatch.setenv("MODELCLI_MODEL", "nets.py:MyLinear(3,2)")
    assert cli("modules", "--json").json["model"]["class"] == "MyLinear"
    assert cli("modules", "nets.py:build", "--json").json["model"]["class"] == "Sequential"
    cli("freeze", "W", "--json")
    monkeypatch.delenv("MODELCLI_MODEL")
    assert cli("log", "--json").json["edits"] == []


def test_all_errors_of_a_recipe_are_reported_at_once(cli: Cli, folder: Path) -> None:
    (folder / "modelcli.toml").write_text(
        'model = "alexnet"\nwieghts = "DEFAULT"\nedits = [\n  "replac classifier.6 ReLU",\n  "freeze features",\n'
        '  "replace classifier.6",\n]\n'
    )
    error = cli("summary", code=2).err
    assert "modelcli.toml:2: unknown key 'wieghts', did you mean weights?" in error
    assert "modelcli.toml:4: no such edit: 'replac'" in error
    assert "modelcli.toml:6: replace takes a target and a module" in error


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        ("summary alexnt", 2, "no model is called 'alexnt'", "did you mean alexnet?"),
        ("freeze featurs -m alexnet -o o.pth", 2, "matches 'featurs'", "features"),
        ("modules alexnet -s clasifier.6", 2, "no module matches 'clasifier.6'", "classifier.6"),
        ("replace **:Conv3d ReLU -m alexnet", 2, "no module matches '**:Conv3d'", "Conv2d"),
        ("replace classifier.6 Linar(2,3) -m alexnet -o o.pth", 2, "no class 'Linar'", "did you mean Linear"),
        ("replace classifier.6 Linear(4096) -m alexnet -o o.pth", 2, "missing a required", "Linear(in_features: int"),
        ("replace classifier.6 -m alexnet", 2, "Missing argument", "modelcli replace --help"),
        ("params missing.pth", 2, "no such file: missing.pth", None),
        ("params empty.pth", 4, "empty.pth is empty", None),
        ("params notes.pth", 4, "notes.pth is not a checkpoint", "torch.save"),
        ("params page.pth", 4, "page.pth is an HTML page", None),
        ("freeze . -m nets.py:Net -o there.pth", 2, "there.pth exists", "--force replaces it"),
        ("freeze . -m nets.py:Net -o out.txt", 2, "does not say which format", ".safetensors"),
        ("save  -m nets.py:Net", 2, "the path to write is empty: ''", "out.pth"),
        ("freeze . -m nets.py:Net -o nets.py/out.pth", 2, "is not a folder", None),
        ("summary", 2, "no model is given", "-m MODEL or $MODELCLI_MODEL, or start a recipe: modelcli load"),
        ("freeze features", 2, "no model is given", "modelcli load alexnet"),
        ("save out.pth", 2, "no model is given", "modelcli load"),
        ("log", 2, "there is no recipe", "modelcli load"),
        ("replace classifier.6 ReLU --dry-rnu -m alexnet", 2, "no such option: --dry-rnu", "--dry-run"),
        ("replace classifier.6 Flatten 1 -2x -m alexnet", 2, "no such option: -2x", None),
        ("sumary alexnet", 2, "No such command", "modelcli --help"),
        ("summary nets.py:Net --input-size 1,x", 2, "input size '1,x'", "1,3,224,224"),
        ("summary nets.py:Net --input-size 1,1,4,4 --input-dtype flaot32", 2, "no dtype 'flaot32'", "float32"),
        ("summary alexnet --mode fast", 2, "unknown mode 'fast'", "eval or"),
        ("modules alexnet --tree --repr", 2, "--tree and --repr", None),
        ("undo 0 --recipe x.toml", 2, "0", None),
        ("list vit --json -f csv", 2, '"--json and -f csv are two formats"', "pass only one of them"),
        ("list vit -f table --json", 2, '"--json and -f table are two formats"', "pass only one of them"),
        ("summary alexnet --seed -1", 2, "--seed must be a whole number", None),
        ("summary bert-base-uncased", 2, "no model is called 'bert-base-uncased'", None),
        ("summary vit", 2, "no model is called 'vit'", "vit_b_16"),
        ("replace fc Linear(_,10) resnet18", 2, "'resnet18' comes after the module", "-m resnet18"),
        ("replace classifier.{1,4} classifier.4 ReLU -m alexnet", 2, "'classifier.4' is not the name", "quote it"),
        ("replace layer1.?.bn1 layer1.1.bn1 ReLU -m resnet18", 2, "'layer1.1.bn1' is not the name", "quote it"),
        ("replace layer? layer1.conv ReLU -m nets.py:Net", 2, "no module matches 'layer?'", None),
    ],
)
def test_bad_input(cli: Cli, folder: Path, words: str, code: int, message: str, hint: str | None) -> None:
    (folder / "empty.pth").write_bytes(b"")
    (folder / "notes.pth").write_text("just some notes")
    (folder / "page.pth").write_text("<!DOCTYPE html><html></html>")
    (folder / "there.pth").write_text("old")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "__pycache__"}
    result = cli(*words.split(" "), code=code)
    assert message in result.err
    assert hint is None or hint in result.err
    assert result.out == ""
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "__pycache__"}
    assert after == before
    assert (folder / "there.pth").read_text() == "old"


def test_a_folder_that_cannot_be_written(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")
    error = cli("save", "locked/out.pth", "-m", "nets.py:Net", code=5).err
    assert "cannot write locked/out.pth: no permission to write in the folder" in error


def test_negative_numbers_are_operands(cli: Cli) -> None:
    document = cli("replace", "classifier.0", "Flatten", "1", "-1", "-m", "alexnet", "--json").json
    assert document["edits"] == ["replace classifier.0 Flatten(1,-1)"]
    document = cli("replace", "features.1", "LeakyReLU", "-0.1", "-m", "alexnet", "--json").json
    assert document["edits"] == ["replace features.1 LeakyReLU(-0.1)"]


def test_words_and_expression_mean_the_same(cli: Cli) -> None:
    words = cli("replace", "features.0", "Conv2d", 3, 64, 11, 4, 2, "padding_mode=reflect", "-m", "alexnet", "--json")
    text = cli("replace", "features.0", "Conv2d(3, 64, 11, 4, 2, padding_mode='reflect')", "-m", "alexnet", "--json")
    assert words.json == text.json


def test_dry_run_changes_nothing_anywhere(cli: Cli, folder: Path) -> None:
    result = cli("freeze", "bn", "-m", "nets.py:Net", "-o", "out.pth", "--dry-run")
    assert "not written: --dry-run changes nothing" in result.out
    result = cli("save", "out.pth", "-m", "nets.py:Net", "--dry-run")
    assert "--dry-run changes nothing" in result.err
    assert not list(folder.glob("*.pth"))


@pytest.mark.parametrize(("out", "kind"), [("out.pth", "pth"), ("out.safetensors", "safetensors"), ("out/", "folder")])
def test_a_dry_run_reports_no_file_and_the_rest_as_if_written(cli: Cli, folder: Path, out: str, kind: str) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(), "in.pth")
    dry = cli("save", out, "-m", "in.pth", "--dry-run", "--json").json
    assert not Path(out).exists()
    done = cli("save", out, "-m", "in.pth", "--json").json
    assert (dry.pop("output"), dry.pop("bytes"), dry.pop("notes")[-1]) == (
        None,
        None,
        "nothing was written: --dry-run changes nothing",
    )
    assert done.pop("bytes") > 0
    assert done.pop("output") in out
    assert (dry["format"], dry["tensors"], dry["params"]) == (kind, 7, 15)
    assert {**dry, "notes": None} == {**done, "notes": None}


def test_without_out_nothing_is_written_and_the_output_says_so(cli: Cli, folder: Path) -> None:
    assert "not written: -o OUT writes the result" in cli("freeze", "bn", "-m", "nets.py:Net").out
    assert not list(folder.glob("*.pth"))


def test_force_replaces(cli: Cli) -> None:
    torch.save(nn.Linear(1, 1).state_dict(), "out.pth")
    cli("freeze", "bn", "-m", "nets.py:Net", "-o", "out.pth", "--force")
    assert "bn.weight" in torch.load("out.pth", weights_only=True)


def test_output_onto_its_own_input(cli: Cli) -> None:
    cli("save", "out.pth", "-m", "nets.py:MyLinear(3,2)")
    before = torch.load("out.pth", weights_only=True)
    cli("freeze", "W", "-m", "out.pth", "--trust", "-o", "out.pth", "--force")
    after = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["name"] for row in cli("params", "out.pth", "--frozen", "--json").json["tensors"]] == ["W"]


def test_the_same_command_writes_the_same_bytes(cli: Cli) -> None:
    for suffix in ("pth", "safetensors"):
        for name in ("one", "another-name"):
            cli("replace", "fc", "Linear(_,3)", "-m", "resnet18", "-o", f"{name}.{suffix}")
        assert Path(f"one.{suffix}").read_bytes() == Path(f"another-name.{suffix}").read_bytes()


def test_names_with_control_characters_are_escaped(cli: Cli) -> None:
    torch.save({"a\x1b[31m.weight": torch.zeros(2), "[bold]x\u202e": torch.zeros(1)}, "odd.pth")
    out = cli("params", "odd.pth").out
    assert "a\\x1b[31m.weight" in out
    assert "[bold]x\\u202e" in out
    assert "\x1b" not in out
    assert json.loads(cli("params", "odd.pth", "--json").out)["tensors"][0]["name"] == "a\x1b[31m.weight"


def test_json_keeps_standard_error_for_the_error(cli: Cli) -> None:
    """Notes are in the document, so that both streams contain only JSON."""
    torch.save({"model": {"weight": torch.zeros(4, 2)}}, "train.pth")
    result = cli("load", "train.pth", "--arch", "Linear(2,3,bias=False)", "--json", code=1)
    assert result.json["notes"] == ["took the state dict under 'model' of train.pth"]
    assert result.error["exit_code"] == 1


def test_an_inspecting_command_takes_the_model_as_an_option(cli: Cli) -> None:
    assert cli("modules", "-m", "nets.py:Net", "--json").json["model"]["class"] == "Net"
    assert "two models" in cli("modules", "alexnet", "-m", "vgg16", code=2).err


def test_an_edit_of_the_recipe_that_fails_is_named(cli: Cli, folder: Path) -> None:
    (folder / "modelcli.toml").write_text('model = "nets.py:Net"\nedits = ["freeze bn", "freeze convv1"]\n')
    error = cli("modules", code=2).err
    assert "modelcli.toml:2: 'freeze convv1': no tensor matches 'convv1'" in error
    assert "conv1" in error


def test_help_and_version(cli: Cli) -> None:
    assert "summary" in cli("--help").out
    assert "summary" in cli().out
    for name in (
        "summary",
        "params",
        "modules",
        "list",
        "replace",
        "freeze",
        "unfreeze",
        "load",
        "save",
        "log",
        "undo",
    ):
        assert f"modelcli {name}" in cli(name, "--help").out  # an example at least
    assert cli("--version").out.startswith("modelcli 0.1.0 (torch ")


def test_a_note_says_that_the_environment_hides_the_recipe(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCLI_MODEL", "nets.py:Net")
    note = "$MODELCLI_MODEL is nets.py:Net and takes precedence over modelcli.toml: unset it to work on the recipe"
    commands = (
        ("modules",),
        ("freeze", "bn"),
        ("save", "out.pth", "--force"),
        ("apply", "-e", "freeze bn"),
        ("script",),
    )
    for words in commands:
        assert note not in cli(*words).err
    cli("load", "nets.py:MyLinear(3,2)")
    for words in commands:
        assert note in cli(*words).err
    assert note not in cli("freeze", "W", "-m", "nets.py:MyLinear(3,2)").err


@pytest.mark.parametrize(
    "words",
    [
        ("freeze", "features", "alexnet"),
        ("cast", ".", "half", "alexnet"),
        ("init", ".", "zeros", "alexnet"),
        ("replace", "classifier.6", "Linear(_,10)", "alexnet"),
        ("rename", "a", "alexnet"),
    ],
)
def test_a_model_without_its_option(cli: Cli, words: tuple[str, ...]) -> None:
    hint = "hint: if alexnet is the model, write -m alexnet\n"
    assert hint in cli(*words, code=2).err
    cli("load", "nets.py:Net")
    assert hint in cli(*words, code=2).err
    assert hint not in cli(*words, "-m", "nets.py:Net", code=2).err


def test_the_hint_for_a_pattern_that_the_shell_expanded(cli: Cli, folder: Path) -> None:
    (folder / "features.pth").touch()
    for words in (("freeze", "features.0", "features.pth"), ("replace", "features.0", "features.pth", "ReLU")):
        assert "if the shell expanded a pattern to it, quote the pattern" in cli(*words, "-m", "alexnet", code=2).err


def test_every_option_of_an_edit_is_known_where_one_is_misspelt(cli: Cli) -> None:
    for wrong, meant in (("--no-sync", "--no-fsync"), ("--input-sise", "--input-size"), ("--debig", "--debug")):
        assert meant in cli("freeze", ".", wrong, "-m", "alexnet", code=2).err


def test_a_cast_shows_bytes(cli: Cli) -> None:
    out = cli("cast", ".", "half", "-m", "Sequential(Linear(1000,1000))").out
    assert out.splitlines()[0].endswith("4.00 MB -> 2.00 MB")
    assert cli("cast", ".", "half", "-m", "Sequential(Linear(2,2))", "-f", "csv").out.endswith(",0\n")


def test_rows_that_do_not_add_up_are_explained(cli: Cli) -> None:
    words = ("replace", "head", "Linear(4,5)", "-m", "nets.py:Tied", "--untie")
    assert (
        "the rows add up to -19 params, the totals to +25: the totals count shared parameters once" in cli(*words).err
    )
    assert "add up" not in cli("replace", "body", "Linear(4,4)", "-m", "nets.py:Tied").err


def test_tensors_of_unknown_modules_are_counted(cli: Cli) -> None:
    torch.save({**{f"bn.{k}": v for k, v in nn.BatchNorm2d(3).state_dict().items()}, "a.w": torch.ones(3)}, "bare.pth")
    assert cli("remove", "a", "-m", "bare.pth", "--json").json["changes"][0]["before"] == "1 tensor"
    assert cli("remove", "bn", "-m", "bare.pth", "--json").json["changes"][0]["before"] == "5 tensors"


def test_load_says_that_values_are_random_or_that_the_architecture_is_unknown(cli: Cli, folder: Path) -> None:
    assert "the values of squeezenet1_1 are random: pass --weights DEFAULT for pretrained ones" in cli(
        "load", "squeezenet1_1"
    ).err.replace("\n", " ")
    torch.save({"a.weight": torch.ones(2)}, "bare.pth")
    assert "bare.pth records no architecture: pass --arch REFERENCE" in cli("load", "bare.pth", "--force").err


def test_the_error_for_a_stated_input_that_does_not_fit_names_it(cli: Cli) -> None:
    told = cli("replace", "fc", "Linear(_,3)", "-m", "resnet18", "--input-size", "3,224,224", code=2).err
    assert "is the input 3,224,224, batch included, right?" in " ".join(told.split())

"""A provider of another package is found everywhere where a built-in one is, with no line of modelcli changed."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelcli
from modelcli import plug_ins, providers
from modelcli.commands import blueprint_cache
from modelcli.errors import RequestError, SystemFailureError
from modelcli.language.expressions import Call
from modelcli.language.references import CheckpointFile, NamedModel, PythonObject
from modelcli.resolve import parse
from tests.conftest import Cli

pytestmark = pytest.mark.usefixtures("plugin")


def library() -> Any:
    from importlib import import_module

    return import_module("modelcli_plugin.tiny_models")


def real(name: str, **arguments: object) -> nn.Module:
    """A model as the plain function draws it after `torch.manual_seed(0)`."""
    torch.manual_seed(0)
    found: nn.Module = getattr(library(), name)(**arguments)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- what a reference means ------------------------------------------------------------------------------------------


def test_its_prefix_names_its_models() -> None:
    assert parse("tiny:mlp") == NamedModel(Call("mlp"), "tiny")
    assert parse("tiny:mlp(width=4)") == NamedModel(Call("mlp", (), {"width": 4}), "tiny")
    for text in ("tiny:mlp", "tiny:mlp(width=4)", "tiny:org/name@main(kind='a(b)')", "tiny:resnet50.a1_in1k"):
        assert str(parse(text)) == text.replace("'", '"') or parse(str(parse(text))) == parse(text)
    assert parse("tiny:org/name@main").call.name == "org/name@main"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiny:", "does not begin with the name of a model"),
        ("tiny:(3)", "does not begin with the name of a model"),
        ("tiny:mlp(width=open('x'))[0]", "is not allowed"),
        ("tiny:mlp(3", "cannot read"),
        ("tiny:mlp(3)(4)", "is not allowed"),
    ],
)
def test_what_is_no_model_of_it(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        parse(text)


def test_a_prefix_goes_before_a_python_module_of_that_name(cli: Cli, folder: Path) -> None:
    """As a builder goes before a file: and a note says how the file is named."""
    (folder / "tiny.py").write_text("from torch import nn\ndef mlp():\n    return nn.Linear(2, 3)\n")
    assert isinstance(parse("tiny:mlp"), NamedModel)
    assert isinstance(parse("tiny.py:mlp"), PythonObject)
    assert isinstance(parse("tinier:mlp"), PythonObject)
    told = cli("params", "tiny:mlp").err
    assert "tiny:mlp means a model of the provider tiny; write tiny.py:... to name the file tiny.py" in told
    assert cli("modules", "tiny.py:mlp", "--json").json["modules"][0]["type"] == "Linear"


def test_entry_points_are_read_for_an_unknown_prefix_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no provider of another package is imported for a model of a built-in one."""

    def fail(**_kwargs: object) -> Any:
        raise AssertionError("entry points were read")

    monkeypatch.setattr("importlib.metadata.entry_points", fail)
    (folder / "best.pth").touch()
    for text in ("alexnet", "Linear(2,3)", "best.pth", "nets.py:Net(3,2)", "torch.nn:Linear(2,3)", "./alexnet/x.pth"):
        try:
            parse(text)
        except RequestError:
            assert text == "./alexnet/x.pth"
    with pytest.raises(AssertionError):
        parse("xyz:Net")


def test_a_folder_that_it_recognises(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider of modelcli's own is asked for every folder, one of another package once it was named."""
    provider = providers.by_prefix("tiny")
    assert provider is not None
    monkeypatch.setattr(type(provider), "recognises", lambda _self, path: (path / "tiny.json").exists())
    for name in ("plain", "own"):
        (folder / name).mkdir()
    (folder / "own" / "tiny.json").touch()
    assert parse("plain/") == CheckpointFile(Path("plain"))
    assert parse("./own") == NamedModel(Call("./own"), "tiny")
    assert parse(str(parse("./own"))) == parse("./own")
    providers.forget()
    assert parse("./own") == CheckpointFile(Path("own"))
    monkeypatch.setattr(providers, "_BY_PREFIX", {"tiny": "modelcli_plugin.tiny"})
    monkeypatch.setattr("modelcli_plugin.tiny.PROVIDER", provider, raising=False)
    assert parse("./own") == NamedModel(Call("./own"), "tiny")


# --- where it is found -----------------------------------------------------------------------------------------------


def test_the_help_names_it(cli: Cli) -> None:
    assert "a model of the plug-in tiny (tiny:NAME)" in " ".join(cli("--help").out.split())


def test_its_names_are_completed_after_the_prefix(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MODELCLI_COMPLETE", "complete_zsh_words")
    for words in (("summary", "tiny:"), ("list", "tiny:"), ("freeze", "fc", "-m", "tiny:")):
        offered = [line.split("\t")[0] for line in cli(*words).out.splitlines()]
        assert offered == ["tiny:mlp", "tiny:conv"], words
    assert cli("summary", "tiny:m").out.split("\t")[0].strip() == "tiny:mlp"
    assert not {"modelcli_plugin.tiny_live", "modelcli_plugin.tiny_models"} & sys.modules.keys()  # its first half does


def test_it_is_listed(cli: Cli) -> None:
    listed = cli("list", "tiny:*", "--json").json["models"]
    assert listed == [
        {"name": "tiny:mlp", "params": 408, "macs": None, "input_size": None, "weights": ["COUNTED"], "group": "toys"},
        {
            "name": "tiny:conv",
            "params": None,
            "macs": None,
            "input_size": None,
            "weights": ["COUNTED"],
            "group": "toys",
        },
    ]
    assert listed[0]["params"] == sum(p.numel() for p in real("mlp").parameters())
    assert {"alexnet", "tiny:mlp"} <= {model["name"] for model in cli("list", "--json").json["models"]}
    assert "nearest: tiny:mlp" in cli("list", "tiny:mlq", code=2).err


def test_a_summary_counts_its_operator(cli: Cli) -> None:
    """Its own input, a batch of one; 48*8 of the linear layer and 8*2 of the operator that the provider knows."""
    shown = cli("summary", "tiny:mlp", "--json")
    document = shown.json
    assert document["input"] == [[1, 3, 4, 4]]
    assert [row["type"] for row in document["layers"]] == ["Sequential", "Flatten", "Linear", "ReLU", "Product"]
    assert document["totals"]["params"] == 408
    assert document["totals"]["macs"] == 48 * 8 + 8 * 2
    assert "lower bound" not in shown.err


def test_arguments(cli: Cli) -> None:
    assert cli("params", "tiny:mlp(width=4,classes=3)", "--json").json["tensors"][0]["shape"] == [4, 48]
    assert "no model 'mlq'" in (error := cli("params", "tiny:mlq", code=2).err)
    assert "did you mean mlp?" in error
    assert "unexpected keyword argument 'wdith'" in (error := cli("params", "tiny:mlp(wdith=4)", code=2).err)
    assert "width: int = 8" in error
    assert "pretrained is True or False" in cli("params", "tiny:mlp(pretrained='no')", code=2).err


def test_weights(cli: Cli) -> None:
    for name in ("DEFAULT", "COUNTED"):
        shown = cli("params", "tiny:conv", "--weights", name, "-s", "0.bias", "--values", "--json").json
        assert shown["tensors"][0]["values"] == pytest.approx([0, 0.001, 0.002, 0.003])
    error = cli("params", "tiny:conv", "--weights", "COUNTD", code=2).err
    assert "tiny:conv has no weights 'COUNTD'" in error
    assert "did you mean COUNTED?" in error
    Path("COUNTED").mkdir()  # a name of weights goes before a folder, as one of a built-in provider does
    cli("params", "tiny:conv", "--weights", "COUNTED")
    loaded = modelcli.load("tiny:conv", weights="DEFAULT").state_dict()
    assert same(dict(loaded), library().counted(real("conv")))


def test_a_look_downloads_nothing(cli: Cli) -> None:
    error = cli("params", "tiny:mlp(pretrained=True)", code=2).err
    assert "would fetch https://models.invalid/mlp.pth" in error


def test_load_draws_what_the_plain_function_draws(folder: Path) -> None:
    assert same(dict(modelcli.load("tiny:mlp(width=4)").state_dict()), dict(real("mlp", width=4).state_dict()))
    assert modelcli.blueprint("tiny:mlp").totals.params == 408


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_record_is_followed_without_trust(cli: Cli, folder: Path) -> None:
    """Its declaration says that its models run the library alone."""
    cli("replace", "3", "Linear(8,5)", "-m", "tiny:mlp", "-o", "out.pth")
    loaded = modelcli.load("out.pth")
    assert type(loaded[3]) is nn.Linear
    assert same(dict(loaded.state_dict()), torch.load("out.pth", weights_only=True))
    assert cli("freeze", ".", "-m", "out.pth", "--json").json["model"]["reference"] == "out.pth"
    cli("save", "own.pth", "-m", "tiny:conv", "-q")
    assert same(torch.load("own.pth", weights_only=True), dict(real("conv").state_dict()))


def test_a_record_of_a_model_that_is_not_declared_as_known_needs_trust(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("save", "own.pth", "-m", "tiny:mlp", "-q")
    provider = providers.by_prefix("tiny")
    assert provider is not None
    monkeypatch.setattr(type(provider), "is_known_code", lambda _self, _name: False)
    assert "--trust" in cli("freeze", ".", "-m", "own.pth", code=3).err
    cli("freeze", ".", "-m", "own.pth", "--trust")


def test_a_file_is_identified(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelcli.live.providers import torchvision as builders

    monkeypatch.setattr(builders, "builder_names", lambda: ["squeezenet1_1"])
    torch.save(real("conv").state_dict(), "bare.pth")
    found = cli("identify", "bare.pth", "--json").json["matches"]
    assert (found[0]["model"], found[0]["exact"]) == ("tiny:conv", True)
    assert "looks like tiny:conv: --arch tiny:conv" in cli("params", "bare.pth").err
    report = cli("load", "bare.pth", "--arch", "tiny:conv", "--json").json
    assert (report["missing"], report["unexpected"]) == ([], [])


def test_its_blueprints_are_kept_with_its_version(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("summary", "tiny:mlp")
    assert len(blueprint_cache.entries()) == 1
    torch.save(real("mlp").state_dict(), "bare.pth")
    assert "looks like tiny:mlp" in cli("params", "bare.pth").err
    monkeypatch.setattr("modelcli.installed.version", lambda package: "2.0" if package == "modelcli-plugin" else None)
    versions = blueprint_cache.Key("tiny:mlp", None, None, (), "eval", prefix="tiny").document()["versions"]
    assert versions["modelcli-plugin"] == "2.0"
    assert blueprint_cache.get(blueprint_cache.Key("tiny:mlp", None, None, (), "eval", prefix="tiny")) is None


@pytest.mark.parametrize("weights", [(), ("--weights", "DEFAULT")])
def test_a_script_builds_it(cli: Cli, folder: Path, site: list[Path], weights: tuple[str, ...]) -> None:
    words = ("-m", "tiny:mlp(width=4)", *weights)
    text = cli("script", *words, "-o", "by_script.pth").out
    assert "from modelcli_plugin import tiny_models" in text
    assert "modelcli." not in text.replace("modelcli_plugin", "")
    Path("script.py").write_text(text)
    runpy.run_path("script.py")
    cli("save", "out.pth", *words)
    assert same(torch.load("by_script.pth", weights_only=True), torch.load("out.pth", weights_only=True))


def test_in_a_recipe(cli: Cli, folder: Path) -> None:
    cli("load", "tiny:mlp(width=4)")
    assert 'model = "tiny:mlp(width=4)"' in Path("modelcli.toml").read_text()
    cli("replace", "3", "Linear(_,5)")
    assert cli("summary", "--json").json["layers"][-1]["output_shape"] == [1, 5]


def test_its_classes_in_expressions(cli: Cli, folder: Path) -> None:
    """They are code of a known library: a record that names one is followed."""
    name = "modelcli_plugin.tiny_models:Product"
    cli("replace", "1", f"{name}(3,2)", "-m", "Sequential(Flatten(),Linear(3,2))", "-o", "out.pth")
    assert type(modelcli.load("out.pth")[1]).__name__ == "Product"


# --- what is wrong with one ------------------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, value: str, prefix: str = "tiny") -> None:
    from importlib.metadata import EntryPoint

    def points(**_kwargs: object) -> Any:
        return [EntryPoint(prefix, value, plug_ins.PROVIDERS)]

    providers.forget()
    monkeypatch.setattr("importlib.metadata.entry_points", points)


@pytest.mark.parametrize(
    ("value", "prefix", "message"),
    [
        (
            "no_such_package:Tiny",
            "tiny",
            "the provider tiny of an unknown package cannot be loaded: ModuleNotFoundError",
        ),
        ("modelcli_plugin.tiny:Nothing", "tiny", "cannot be loaded: AttributeError"),
        ("modelcli_plugin tiny", "tiny", "cannot be loaded: "),
        ("modelcli_plugin.tiny_models:Product.__name__", "tiny", "is no subclass of modelcli.providers.base.Provider"),
        ("modelcli_plugin.tiny:Tiny", "small", "modelcli_plugin.tiny:Tiny calls its prefix tiny"),
    ],
)
def test_a_provider_that_cannot_be_loaded(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, value: str, prefix: str, message: str
) -> None:
    """It is an error where it is asked for, a note where all are, and nothing else suffers from it."""
    broken(monkeypatch, value, prefix)
    error = cli("params", f"{prefix}:mlp", code=5).err
    assert message in error
    assert f"fix or uninstall the package, which registers {prefix} as {value}" in error
    listed = cli("list", "squeezenet1_1")
    assert message in listed.err
    assert "squeezenet1_1" in listed.out
    with pytest.raises(SystemFailureError):
        providers.by_prefix(prefix)


@pytest.mark.parametrize(
    ("live", "message"),
    [
        (
            "modelcli_plugin.tiny:Nothing",
            "names modelcli_plugin.tiny:Nothing as its torch half, which is no class",
        ),
        (
            "no_such_half:Live",
            "the provider tiny of modelcli-plugin 1.0 failed: ModuleNotFoundError: No module named 'no_such_half'",
        ),
    ],
)
def test_a_provider_without_a_torch_half(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, live: str, message: str
) -> None:
    """Its own models cannot be had; those of others can, and a note says what is missing."""
    from modelcli.live.providers import torchvision as builders

    monkeypatch.setattr(builders, "builder_names", lambda: ["squeezenet1_1"])
    provider = providers.by_prefix("tiny")
    assert provider is not None
    monkeypatch.setattr(type(provider), "live", live)
    assert message in cli("params", "tiny:mlp", code=5).err
    assert message in (listed := cli("list")).err
    assert listed.out.splitlines()[1].startswith("squeezenet1_1")
    torch.save(real("conv").state_dict(), "bare.pth")
    for _ in range(2):  # what could not be asked is asked again
        assert message in cli("identify", "bare.pth", code=1).err


def test_a_model_that_cannot_be_built_is_not_compared(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelcli.live.providers import torchvision as builders

    monkeypatch.setattr(builders, "builder_names", lambda: ["squeezenet1_1"])
    torch.save(real("conv").state_dict(), "bare.pth")

    def fails(**_arguments: object) -> nn.Module:
        raise ValueError("broken")

    monkeypatch.setattr(library(), "mlp", fails)
    for _ in range(2):
        found = cli("identify", "bare.pth", "--json")
        assert found.json["matches"][0]["model"] == "tiny:conv"
        assert "tiny:mlp was not compared: tiny:mlp: broken" in found.json["notes"]


def test_a_separate_process_finds_the_provider(folder: Path, site: list[Path]) -> None:
    """As after `pip install`: an environment that has it, and no code of this test's."""
    paths = os.pathsep.join([*map(str, site), *sys.path])
    words = [sys.executable, "-m", "modelcli", "params", "tiny:conv", "-f", "csv"]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.stdout.splitlines()[1].startswith('0.weight,"[4,3,3,3]",float32')
    assert done.stderr == ""


def test_no_plug_in_is_loaded_from_the_current_folder(folder: Path) -> None:
    """What lies where somebody works registers nothing: neither help nor completion would tell it from a package."""
    about = folder / "evil-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[modelcli.providers]\nevil = evil:Provider\n")
    (folder / "evil.py").write_text("open('ran', 'w').close()\n")
    program = [sys.executable, "-m", "modelcli"]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    assert "evil" not in shown.stdout
    asked = os.environ | {"_MODELCLI_COMPLETE": "complete_zsh_words"}
    assert subprocess.run([*program, "params", "evil:"], env=asked, capture_output=True, text=True).stdout == ""
    assert not (folder / "ran").exists()

"""Folders in timm's layout on the Hub are models, and are saved so that `timm.create_model` loads them."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import nn

import modelcli
from tests.conftest import Cli


def saved(path: str, name: str, **arguments: Any) -> nn.Module:
    """Save a model as timm pushes it to the Hub."""
    torch.manual_seed(1)
    model: nn.Module = timm.create_model(name, **arguments).eval()
    save_for_hf(model, path, safe_serialization=True)
    return model


def loaded(path: str) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return model.eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_vit", {}),
        ("test_vit", {"num_classes": 5, "in_chans": 1, "img_size": 96}),
        ("test_resnet", {"num_classes": 3}),
        ("test_efficientnet", {"in_chans": 2}),
        ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg"}),
    ],
)
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_opens_and_comes_out_with_equal_values(
    cli: Cli, folder: Path, name: str, arguments: dict[str, Any], weights: str
) -> None:
    model = saved("model", name, **arguments)
    if weights == "pytorch_model.bin":
        (folder / "model" / "model.safetensors").unlink()
        torch.save(model.state_dict(), "model/pytorch_model.bin")
    (folder / "model" / "README.md").write_text("of mine")
    document = cli("summary", "./model", "--json").json
    assert document["input"] == [
        [1, arguments.get("in_chans", 3), *[arguments.get("img_size", document["input"][0][2])] * 2]
    ]
    result = cli("save", "out/", "-m", "./model")
    assert same(loaded("out"), model)
    assert (folder / "out" / "README.md").read_text() == "of mine"
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["architecture"] == name
    assert config["num_classes"] == model.num_classes
    assert "cannot" not in result.err


def test_a_new_head_and_stem_are_in_the_configuration(cli: Cli, folder: Path) -> None:
    model = saved("model", "test_vit")
    edits = ["-e", "replace @head Linear(_,10)", "-e", "replace @stem Conv2d(4,_,_,_)"]
    cli("apply", *edits, "-m", "./model", "-o", "out/", "--input-size", "1,4,160,160")
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["num_classes"] == config["model_args"]["num_classes"] == 10
    assert config["model_args"]["in_chans"] == 4
    assert config["pretrained_cfg"]["input_size"][0] == 4
    found = loaded("out")
    ours = modelcli.load("out/")
    assert same(found, ours)
    assert torch.equal(found.pos_embed, model.pos_embed)
    image = torch.randn(1, 4, 160, 160)
    one, other = copy.deepcopy(found), copy.deepcopy(ours).eval()  # equal memory alignment, since kernels depend on it
    with torch.no_grad():
        assert torch.equal(one(image), other(image))


def test_a_note_names_changes_that_the_configuration_cannot_express(cli: Cli) -> None:
    saved("model", "test_vit")
    result = cli("replace", "@head", "Sequential(Linear(64,8),Linear(8,4))", "-m", "./model", "-o", "out/")
    assert "config.json cannot say what the edits changed" in result.err
    assert "head.0.weight" in result.err or "head.weight" in result.err


@pytest.mark.parametrize("size", ["50KB", "1"])
def test_weights_larger_than_a_shard_are_one_file_that_timm_loads(cli: Cli, folder: Path, size: str) -> None:
    model = saved("model", "test_resnet", num_classes=3)
    result = cli("save", "out/", "-m", "./model", "--max-shard-size", size)
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert f"timm reads the weights of a folder from one file: model.safetensors has all {nbytes:,} bytes" in result.err
    assert {path.name for path in (folder / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert same(loaded("out"), model)
    assert same(modelcli.load("out/"), model)


def test_one_file_replaces_the_shards_of_the_folder(cli: Cli, folder: Path) -> None:
    model = saved("model", "test_resnet", num_classes=3)
    torch.save(model.state_dict(), "plain.pth")
    cli("save", "out/", "-m", "plain.pth", "--bare-keys", "--max-shard-size", "50KB")
    assert len(list((folder / "out").iterdir())) > 2
    cli("save", "out/", "-m", "./model", "--max-shard-size", "50KB", "--force")
    assert {path.name for path in (folder / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert same(loaded("out"), model)


def test_weights_smaller_than_a_shard_need_no_note(cli: Cli) -> None:
    saved("model", "test_resnet")
    assert "from one file" not in cli("save", "out/", "-m", "./model").err


def test_a_model_by_its_name_comes_out_as_a_folder_too(cli: Cli) -> None:
    cli("replace", "@head", "Linear(_,6)", "-m", "timm:test_resnet", "-o", "out/")
    model = loaded("out")
    assert model.num_classes == 6
    assert same(model, modelcli.load("out/"))


def test_a_file_made_from_a_folder_needs_no_folder(cli: Cli, folder: Path) -> None:
    model = saved("model", "test_vit", num_classes=5, in_chans=1)
    cli("save", "out.pth", "-m", "./model")
    for path in (folder / "model").iterdir():
        path.unlink()
    assert same(modelcli.load("out.pth"), model)


def test_other_arguments_adapt_the_weights_of_a_folder(cli: Cli) -> None:
    saved("model", "test_vit", num_classes=5)
    expected = timm.create_model("local-dir:model", pretrained=True, img_size=96, in_chans=1)
    cli("save", "out.pth", "-m", "timm:./model(img_size=96, in_chans=1)")
    found = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


def test_a_folder_of_the_name_of_a_model_is_a_folder(cli: Cli) -> None:
    model = saved("test_vit", "test_vit", num_classes=5)
    cli("save", "out.pth", "-m", "test_vit")
    assert same(modelcli.load("out.pth"), model)
    cli("save", "named.pth", "-m", "timm:test_vit")
    assert len(torch.load("named.pth", weights_only=True)["head.bias"]) == 1000


def test_a_script_loads_the_folder_with_timm(cli: Cli) -> None:
    model = saved("model", "test_vit", num_classes=5)
    result = cli("script", "-o", "made.pth", "-m", "./model")
    exec(compile(result.out, "script.py", "exec"), {})
    found = torch.load("made.pth", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "changed",
    [
        {"architecture": "no_such_model"},
        {"pretrained_cfg": {"no_such_entry": 1}},
        {"model_args": {"no_such_argument": 1}},
        {"model_args": {"checkpoint_path": "/etc/passwd"}},
        {"model_args": {"depth": 10**7}},
    ],
)
def test_a_configuration_that_is_wrong_is_refused(cli: Cli, folder: Path, changed: dict[str, Any]) -> None:
    saved("model", "test_vit")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    assert modelcli_code("summary", "./model") in (2, 3, 4)


@pytest.mark.parametrize("arguments", [{"depth": 10**7}, {"depths": [10**6] * 4}])
def test_too_many_layers_are_refused_from_the_numbers(cli: Cli, folder: Path, arguments: dict[str, Any]) -> None:
    saved("model", "test_vit")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_args": arguments}))
    started = time.process_time()
    assert "asks for too many layers" in cli("summary", "./model", code=3).err
    assert time.process_time() - started < 5
    assert "asks for too many layers" in cli("summary", "timm:test_vit(depth=10000000)", code=3).err


def modelcli_code(*words: str) -> int:
    from modelcli.cli import main

    return main(list(words))

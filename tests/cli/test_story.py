"""The story of the README, through the command line, compared with plain PyTorch at each step."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import modelcli
from modelcli.live.providers import torchvision as builders
from tests.conftest import Cli


def alexnet(**kwargs: int) -> nn.Module:
    model: nn.Module = builders.torchvision().models.alexnet(**kwargs)
    return model


def test_a_users_own_class(cli: Cli) -> None:
    document = cli("summary", "nets.py:Net", "--input-size", "1,1,1,1", "--json").json
    rows = {layer["path"]: layer for layer in document["layers"]}
    assert [rows[path]["params"] for path in (".", "conv1", "bn", "conv2")] == [27, 6, 6, 15]
    shapes = [rows[path]["output_shape"] for path in ("conv1", "bn", "conv2")]
    assert shapes == [[1, 3, 1, 1], [1, 3, 1, 1], [1, 5, 1, 1]]
    text = cli("summary", "nets.py:Net", "--input-size", "1,1,1,1").out
    for line in (
        "Total params:               27",
        "Input size:                 0.000004 MB",
        "Params size:                0.000108 MB",
    ):
        assert line in text


def test_values_and_what_is_a_buffer(cli: Cli) -> None:
    document = cli("params", "nets.py:Net", "--values", "--json").json
    rows = {row["name"]: row for row in document["tensors"]}
    assert "offset" not in rows  # a plain tensor attribute
    assert rows["scale"]["kind"] == "buffer"
    assert rows["scale"]["values"] == [2.0]
    assert rows["bn.weight"]["values"] == [1.0, 1.0, 1.0]
    torch.manual_seed(0)
    drawn = nn.Conv2d(1, 3, 1)
    assert rows["conv1.weight"]["values"] == drawn.weight.tolist()
    text = cli("params", "nets.py:Net", "--values").out
    assert re.search(r"^scale +\[1\] +float32 +1 +4 +buffer +- +\[2\]$", text, re.MULTILINE)
    assert re.search(r"^bn.bias +\[3\] +float32 +3 +12 +parameter +yes +\[0,0,0\]$", text, re.MULTILINE)


def test_hand_made_parameters(cli: Cli) -> None:
    rows = cli("params", "nets.py:MyLinear(3,2)", "--json").json["tensors"]
    assert [(row["name"], row["shape"], row["kind"]) for row in rows] == [
        ("W", [2, 3], "parameter"),
        ("b", [2], "parameter"),
    ]


def test_showing_alexnet(cli: Cli) -> None:
    model = alexnet()
    document = cli("summary", "alexnet", "--json").json
    assert document["totals"]["params"] == 61_100_840 == sum(p.numel() for p in model.parameters())
    assert document["input"] == [[1, 3, 224, 224]]
    paths = [row["path"] for row in cli("modules", "alexnet", "--json").json["modules"]]
    assert paths == [name or "." for name, _ in model.named_modules()]
    assert cli("modules", "alexnet", "-s", "classifier", "--repr").out == f"{model.classifier}\n"
    assert cli("modules", "alexnet", "--repr").out == f"{model}\n"
    (row,) = cli("modules", "alexnet", "-s", "classifier.0", "--json").json["modules"]
    assert (row["path"], row["type"], row["config"]) == ("classifier.0", "Dropout", "p=0.5, inplace=False")
    (row,) = cli("modules", "alexnet", "-s", "classifier", "--json").json["modules"]
    assert (row["path"], row["type"], row["params"]) == ("classifier", "Sequential", 58_631_144)


def test_new_head_frozen_backbone_saved_and_loaded(cli: Cli, folder: Path) -> None:
    cli("load", "alexnet")
    cli("replace", "classifier.6", "Linear(4096,10)")
    cli("freeze", "features")
    totals = cli("summary", "--json").json["totals"]

    torch.manual_seed(0)
    plain = alexnet()
    plain.classifier[6] = nn.Linear(4096, 10)
    for parameter in plain.features.parameters():
        parameter.requires_grad_(False)
    assert totals["params"] == sum(p.numel() for p in plain.parameters())
    assert totals["trainable_params"] == sum(p.numel() for p in plain.parameters() if p.requires_grad)

    cli("save", "runs/best.pth")
    frozen = [row["name"] for row in cli("params", "runs/best.pth", "--frozen", "--json").json["tensors"]]
    assert frozen == [name for name, p in plain.named_parameters() if not p.requires_grad]

    state = torch.load("runs/best.pth", weights_only=True)
    ten = alexnet(num_classes=10)
    ten.load_state_dict(state)
    for name, tensor in plain.state_dict().items():
        if not name.startswith("classifier.6"):
            assert torch.equal(tensor, state[name]), name

    model = modelcli.load("runs/best.pth")
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    image = torch.randn(2, 3, 224, 224)
    assert torch.equal(model.eval()(image), ten.eval()(image))

    # Another architecture than that of the record: the error names each key, and the recipe is unchanged.
    before = (folder / "modelcli.toml").read_text()
    result = cli("load", "runs/best.pth", "--arch", "alexnet", "--json", code=1)
    assert [row["name"] for row in result.json["mismatched"]] == ["classifier.6.weight", "classifier.6.bias"]
    assert result.json["mismatched"][0] == {
        "name": "classifier.6.weight",
        "expected": [1000, 4096],
        "found": [10, 4096],
    }
    assert "classifier.6.weight" in result.error["message"]
    assert (folder / "modelcli.toml").read_text() == before


def test_the_same_in_one_line(cli: Cli) -> None:
    result = cli("replace", "classifier.6", "Linear(_,10)", "-m", "alexnet", "-o", "head10.pth")
    lines = result.out.splitlines()
    assert len(lines) == 4
    assert lines[0].split()[0] == "classifier.6"
    assert lines[1] == "params:  61,100,840 -> 57,044,810 (-4,056,030)"
    assert lines[2] == "check:   runs: [1,3,224,224] -> [1,10]"
    assert re.fullmatch(r"written: head10.pth \(228\.\d\d MB\)", lines[3])
    alexnet(num_classes=10).load_state_dict(torch.load("head10.pth", weights_only=True))
    assert "randomly initialised" in result.err

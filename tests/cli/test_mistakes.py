"""The most common mistakes and the whole message for each, which says what was wrong and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from modelcli import edits
from modelcli.checkpoints import formats
from modelcli.cli import synonyms
from modelcli.cli.app import app
from tests.conftest import Cli

MISTAKES = {
    "a model that is spelt wrongly": (
        "summary alexnt",
        2,
        "error: no model is called 'alexnt': no builder, no class of torch.nn\n"
        "hint: did you mean alexnet? modelcli list shows them all",
    ),
    "a model as Python names it": (
        "summary torchvision.models.resnet18(num_classes=3)",
        2,
        "error: no class 'torchvision.models.resnet18' in torch.nn or torchvision.ops\n"
        "hint: torchvision's models go by their names: resnet18(num_classes=3)",
    ),
    "a model as a program with imports names it": (
        "summary models.resnet18",
        2,
        "error: no module named models\nhint: torchvision's models go by their names: resnet18",
    ),
    "no model": (
        "freeze features",
        2,
        "error: no model is given, and there is no modelcli.toml\n"
        "hint: name one with -m MODEL or $MODELCLI_MODEL, or start a recipe: modelcli load alexnet",
    ),
    "a model before its edit": (
        "replace resnet18 fc 'Linear(_,10)'",
        2,
        "error: no model is given, and there is no modelcli.toml\n"
        "hint: -m names the model: modelcli replace fc 'Linear(_,10)' -m resnet18",
    ),
    "a model in the place of the target": (
        "freeze resnet18 --except fc",
        2,
        "error: no model is given, and there is no modelcli.toml\n"
        "hint: -m names the model: modelcli freeze --except fc TARGET -m resnet18",
    ),
    "a value left out": (
        "replace fc Linear 4 5 bias= -m resnet18",
        2,
        "error: bias= has no value\nhint: bias=None, bias=True, or bias=_ for what it was",
    ),
    "text for what is true or false": (
        "replace fc Linear _ 10 bias=flase -m resnet18",
        2,
        "error: fc: Linear(512,10,bias='flase'): bias is True or False, not 'flase'\nhint: bias=True or bias=False",
    ),
    "text for what is true or false, of a builder": (
        """summary "resnet18(zero_init_residual='yes')\"""",
        2,
        "error: resnet18(zero_init_residual='yes'): zero_init_residual is True or False, not 'yes'\n"
        "hint: zero_init_residual=True or zero_init_residual=False",
    ),
    "an argument that a builder does not have": (
        "summary 'resnet18(in_channels=1)'",
        2,
        "error: resnet18(in_channels=1): ResNet.__init__() got an unexpected keyword argument 'in_channels'\n"
        "hint: resnet18(num_classes: int = 1000, zero_init_residual: bool = False, groups: int = 1, "
        "width_per_group: int = 64, replace_stride_with_dilation=None, norm_layer=None)",
    ),
    "one channel": (
        "replace conv1 'Conv2d(1,64,7,stride=_,padding=_,bias=_)' -m resnet18",
        2,
        "error: conv1 Conv2d(1, 64, (7,7), stride=(2,2), padding=(3,3), bias=False) does not fit: "
        "[1,3,224,224] float32 flows in, it expects 1 channel\n"
        "hint: replace conv1 'Conv2d(_,64,(7,7),stride=(2,2),padding=(3,3),bias=False)' takes in_channels=3 "
        "from what flows in; or pass --input-size 1,1,224,224, if that is the input you want",
    ),
    "a scheme that no such tensor takes": (
        "init bn1 xavier_uniform -m resnet18",
        2,
        "error: xavier_uniform fills nothing: bn1.weight: Fan in and fan out can not be computed for tensor with "
        "fewer than 2 dimensions\nhint: normal, uniform, constant, ones and zeros fill any tensor",
    ),
    "a dtype that no input has": (
        "summary alexnet --input-dtype quint8",
        2,
        "error: an input cannot have the quantized dtype quint8\nhint: float32, bfloat16 or int64",
    ),
    "no recipe to show": (
        "log",
        2,
        "error: there is no recipe: modelcli.toml does not exist\nhint: modelcli load MODEL starts one",
    ),
    "no recipe to take back from": (
        "undo 2 --recipe head.toml",
        2,
        "error: there is no recipe: head.toml does not exist\nhint: modelcli load MODEL --recipe head.toml starts one",
    ),
    "a command that is spelt wrongly": (
        "sumary alexnet",
        2,
        "error: No such command 'sumary'. Did you mean 'summary'?\nhint: modelcli --help shows the usage",
    ),
    "another program's word for a command": (
        "rm '**:Dropout' -m alexnet",
        2,
        "error: No such command 'rm'.\nhint: did you mean: modelcli remove '**:Dropout' -m alexnet",
    ),
    "a format to convert to": (
        "convert best.pth best.safetensors",
        2,
        "error: No such command 'convert'.\nhint: did you mean: modelcli save best.safetensors -m best.pth",
    ),
    "an option that is spelt wrongly": (
        "summary alexnet --dept 1",
        2,
        "error: No such option: --dept (Possible options: --depth, --help, --mode)\n"
        "hint: modelcli summary --help shows the usage",
    ),
    "a path that is spelt wrongly": (
        "freeze clasifier.6 -m alexnet",
        2,
        "error: no tensor matches 'clasifier.6'\nhint: nearest: classifier.6, classifier.5, classifier.4",
    ),
    "a file that is not there": (
        "params bets.pth",
        2,
        "error: no such file: bets.pth\nhint: here are: best.pth, nets.py",
    ),
    "a module that does not fit": (
        "replace classifier.6 Linear(4095,10) -m alexnet -o out.pth",
        2,
        "error: classifier.6 Linear(4095, 10) does not fit: [1,4096] float32 flows in (from "
        "classifier.5 ReLU(inplace=True)), it expects [*,4095]\n"
        "hint: replace classifier.6 'Linear(_,10)' takes in_features=4096 from what flows in",
    ),
    "an argument that is missing": (
        "replace classifier.6 Linear(4096) -m alexnet -o out.pth",
        2,
        "error: classifier.6: Linear(4096): missing a required argument: 'out_features'\n"
        "hint: Linear(in_features: int, out_features: int, bias: bool = True)",
    ),
    "a model in pieces": (
        "load resnet18 num_classes=37",
        2,
        "error: Got unexpected extra argument(s) (num_classes=37)\n"
        "hint: write a model and its arguments as one word: modelcli load 'resnet18(num_classes=37)'",
    ),
    "targets with a comma between": (
        "freeze features,classifier -m alexnet",
        2,
        "error: no tensor matches 'features,classifier'\nhint: write '{features,classifier}', in quotes",
    ),
    "several modules": (
        "replace classifier.6 Linear(_,3) Linear(3,4) -m alexnet",
        2,
        "error: replace takes one target and one module, not 2 modules: Linear(_,3), Linear(3,4)\n"
        "hint: write several modules as one: 'Sequential(Linear(_,3), Linear(3,4))'",
    ),
    "a scheme in pieces": (
        "init classifier.6 normal std=0.01 -m alexnet",
        2,
        "error: 'std=0.01' is not a scheme but an argument of one\nhint: write it as 'normal(std=0.01)'",
    ),
    "a model without its -m": (
        "replace fc Linear(_,10) resnet18",
        2,
        "error: 'resnet18' comes after the module Linear(_,10)\nhint: if resnet18 is the model, write -m resnet18",
    ),
    "a file that would be overwritten": (
        "freeze 0 -m best.pth -o best.pth",
        2,
        "error: best.pth exists\nhint: --force replaces it",
    ),
    "an output without a suffix": (
        "freeze 0 -m best.pth -o out",
        2,
        "error: out does not say which format to write\n"
        f"hint: end it in {formats.how_to_name()}, or / (a folder of shards)",
    ),
    "another number of classes": (
        "load best.pth --arch Sequential(Linear(2,4))",
        1,
        "error: best.pth does not fit Sequential(Linear(2,4)): 0.weight is [3, 2] in the file and [4, "
        "2] in the architecture; 0.bias is [3] in the file and [4] in the architecture\n"
        "hint: pass --arch with the arguments that the file was made with: 'Sequential(...)'",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_the_whole_message(mistake: str, cli: Cli, folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 3)).state_dict(), "best.pth")
    words, code, said = MISTAKES[mistake]
    assert cli(*shlex.split(words), code=code).err.rstrip("\n") == said
    assert {path.name for path in folder.iterdir()} <= {"nets.py", "best.pth", "__pycache__"}


def test_the_hint_for_a_command_of_another_program(cli: Cli) -> None:
    group: Any = typer.main.get_command(app)
    known = set(group.commands)
    others = [word for kind in edits.usable() for word in kind.also_called]
    assert set(synonyms.COMMANDS.values()) <= known
    assert not known & {*synonyms.COMMANDS, *synonyms.COPYING, *others, "strip"}
    assert len({*synonyms.COMMANDS, *synonyms.COPYING, *others}) == sum(
        map(len, (synonyms.COMMANDS, synonyms.COPYING, others))
    )
    assert {"rm", "mv", "to", "swap", "reset"} <= set(others)
    assert "modelcli rename 'module.**' '**'" in cli("strip", "module.", "-m", "x.pth", code=2).err


def test_the_hint_for_a_model_without_its_option(cli: Cli, folder: Path) -> None:
    torch.save(nn.Linear(4, 5).state_dict(), "bare.pth")
    found = cli("freeze", "bare.pth", "weight", code=2)
    line = found.err.strip().partition("hint: -m names the model: ")[2]
    assert line == "modelcli freeze weight -m bare.pth"
    cli(*shlex.split(line)[1:])
    assert "modelcli freeze TARGET -m bare.pth" in cli("freeze", "bare.pth", code=2).err
    line = cli("rename", "bare.pth", "weight", "w", code=2).err.strip().partition("the model: ")[2]
    assert line == "modelcli rename weight w -m bare.pth"
    cli(*shlex.split(line)[1:])
    for words in (("freeze", "bare.pth", "weight"), ("rename", "bare.pth", "weight", "w")):
        out = f"{words[0]}.pth"
        line = cli(*words, "-o", out, code=2).err.strip().partition("the model: ")[2]
        cli(*shlex.split(line)[1:])
        assert (folder / out).is_file()

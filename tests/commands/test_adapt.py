"""`adapt` makes the right edits, and its results equal those of the libraries' own functions."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import modelcli
from modelcli.live.surgery import seed_of
from tests.cli.test_readme import flat
from tests.conftest import Cli
from tests.live.test_landmarks import BUILDERS, DETECTORS, built
from tests.sampling import sampled

OWN = """
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(1, 1)
        self.last = nn.Linear(4, 7, bias=False)
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect")

    def forward(self, x):
        return self.last(self.first(x).mean((2, 3)))

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 11)
        self.embed = nn.Embedding(11, 4)

    def forward(self, tokens):
        return self.out(self.embed(tokens))

class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.LayerNorm(4))
"""


@pytest.fixture
def own(folder: Path) -> str:
    (folder / "own.py").write_text(OWN)
    return "own.py:Own"


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "edits"),
    [
        ("resnet18", ["replace fc Linear(_,10)"]),
        ("squeezenet1_1", ["replace classifier.1 Conv2d(_,10,_)"]),
        ("googlenet", ["replace fc Linear(_,10)", "replace aux1.fc2 Linear(_,10)", "replace aux2.fc2 Linear(_,10)"]),
        (
            "fcn_resnet50(aux_loss=True)",
            ["replace classifier.4 Conv2d(_,10,_)", "replace aux_classifier.4 Conv2d(_,10,_)"],
        ),
        ("vit_b_16", ["replace heads.head Linear(_,10)"]),
    ],
)
def test_classes_replace_every_classifier(cli: Cli, model: str, edits: list[str]) -> None:
    done = cli("adapt", "--classes", 10, "-m", model, "--json").json
    assert done["edits"] == edits
    assert done["check"]["ran"]
    assert done["output"] is None


@pytest.mark.parametrize("name", sampled([*BUILDERS, *DETECTORS], one_in=5))
def test_the_shapes_are_those_of_the_builder_with_num_classes(cli: Cli, name: str) -> None:
    cli("load", name)
    assert "\nreplace " in f"\n{cli('adapt', '--classes', 7, '--check', 'none').out}"
    found = {
        row["name"]: row["shape"] for row in cli("params", "--json").json["tensors"] if row.get("persistent", True)
    }
    assert found == {key: list(value.shape) for key, value in built(name, 7).state_dict().items()}


def test_a_detector_with_other_classes_runs_as_the_builder_with_num_classes_does(cli: Cli) -> None:
    torch.manual_seed(0)
    name = "ssdlite320_mobilenet_v3_large"
    cli("adapt", "--classes", 7, "-m", name, "-o", "o.pth")
    expected = built(name, 7, "cpu").eval()
    expected.load_state_dict(torch.load("o.pth", weights_only=True))
    image = [torch.rand(3, 64, 64)]
    (mine,), (theirs,) = modelcli.load("o.pth").eval()(image), expected(image)
    assert len(mine["scores"])
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("retinanet_resnet50_fpn", "head.classification_head.cls_logits"),
        ("fcos_resnet50_fpn", "head.classification_head.cls_logits"),
        ("ssd300_vgg16", "head.classification_head.module_list.0"),
        ("ssdlite320_mobilenet_v3_large", "head.classification_head.module_list.0.1"),
        ("maskrcnn_resnet50_fpn", "roi_heads.mask_predictor.mask_fcn_logits"),
    ],
)
def test_the_layers_of_a_detector_are_drawn_as_torchvision_draws_them(cli: Cli, name: str, layer: str) -> None:
    done = cli("adapt", "--classes", 64, "-m", name, "--json").json
    lines = [shlex.split(line) for line in done["edits"]]
    (target, *words), *_ = [line for (edit, *line) in lines if edit == "init" and line[0].startswith(layer)]
    drawn = built(name, 64, "cpu").get_submodule(layer)
    mine = deepcopy(drawn)
    nn.init.zeros_(mine.weight)
    modelcli.apply(mine, shlex.join(["init", target.removeprefix(layer).removeprefix(".") or ".", *words]))
    assert mine.weight.std().item() == pytest.approx(drawn.weight.std().item(), rel=0.1)
    assert torch.equal(mine.bias, drawn.bias)


def test_a_detector_with_another_head_is_an_error(cli: Cli) -> None:
    cli("load", "ssdlite320_mobilenet_v3_large")
    cli("replace", "head.classification_head", "Identity", "--check", "none")
    done = cli("adapt", "--classes", 7, code=2)
    assert "no library says which of its layers decide the number of classes" in flat(done.err)


def test_a_detector_that_has_the_classes_needs_no_edit(cli: Cli) -> None:
    done = cli("adapt", "--classes", 91, "-m", "fcos_resnet50_fpn", "--check", "none")
    assert "fcos_resnet50_fpn has 91 classes already" in flat(done.err)


def test_other_layers_keep_their_values_and_the_edits_seed_draws_new_ones(cli: Cli) -> None:
    torch.manual_seed(3)
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), "m.pth")
    cli("adapt", "--classes", 10, "-m", "m.pth", "--arch", "resnet18", "-o", "o.pth")
    found = torch.load("o.pth", weights_only=True)
    torch.manual_seed(seed_of(0, 1))
    model.fc = nn.Linear(512, 10)
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


# --- input channels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_convolution_is_that_of_timm(cli: Cli, channels: int, dtype: torch.dtype) -> None:
    from timm.models import adapt_input_conv

    model = torchvision.models.resnet18().to(dtype)
    torch.save(model.state_dict(), "m.pth")
    done = cli("adapt", "--in-channels", channels, "-m", "m.pth", "--arch", "resnet18", "-o", "o.pth", "--json").json
    assert done["edits"] == [f"replace conv1 Conv2d({channels},_,_,stride=_,padding=_,bias=_) --keep-weights=sum"]
    assert done["check"] == {"ran": True, "reason": None, "output_shape": [1, 1000], "input": [[1, channels, 224, 224]]}
    found = torch.load("o.pth", weights_only=True)
    assert torch.equal(found["conv1.weight"], adapt_input_conv(channels, model.conv1.weight.detach()))
    assert cli("summary", "o.pth", "--json").json["input"] == [[1, channels, 224, 224]]


def test_the_input_channels_of_a_video_model(cli: Cli) -> None:
    done = cli("adapt", "--in-channels", 1, "-m", "r3d_18", "--json").json
    assert done["check"]["input"] == [[1, 1, 16, 112, 112]]
    assert done["edits"] == ["replace stem.0 Conv3d(1,_,_,stride=_,padding=_,bias=_) --keep-weights=sum"]


# --- models of other classes -----------------------------------------------------------------------------------------


def test_the_layers_of_an_own_class_are_the_first_and_the_last_that_ran(cli: Cli, own: str) -> None:
    words = ("--classes", 2, "--in-channels", 1, "-m", own, "--input-size", "1,3,8,8")
    done = cli("adapt", *words, "-o", "o.pth", "--json").json
    assert done["edits"] == [
        "replace last Linear(_,2,bias=_)",
        "replace first Conv2d(1,_,_,stride=_,padding=_,padding_mode=_) --keep-weights=sum",
    ]
    assert done["check"]["input"] == [[1, 1, 8, 8]]
    assert done["check"]["output_shape"] == [1, 2]
    assert "last.bias" not in torch.load("o.pth", weights_only=True)


def test_an_input_by_name_gets_the_channels(cli: Cli, own: str) -> None:
    done = cli("adapt", "--in-channels", 1, "-m", own, "--input", "x=2,3,8,8", "--json").json
    assert done["check"]["input"] == [[2, 1, 8, 8]]


def test_models_of_no_library_need_an_input_and_suitable_layers(cli: Cli, own: str) -> None:
    done = cli("adapt", "--classes", 2, "-m", own, "-o", "o.pth", code=2)
    assert "no library says which layer of own.py:Own is the classifier" in done.err
    assert "hint: pass --input-size, batch included, or name the layer: replace PATH 'Linear(_,2)'" in done.err
    done = cli("adapt", "--classes", 2, "-m", own, "--input-size", "1,5,8,8", code=2)
    assert "the forward pass ended in first" in done.err
    done = cli("adapt", "--classes", 2, "-m", "own.py:Normed", "--input-size", "1,4", code=2)
    assert "the classifier 1 is LayerNorm((4,)), and adapt replaces Linear and convolutions only" in done.err
    done = cli("adapt", "--in-channels", 2, "-m", "own.py:Normed", "--input-size", "1,4", code=2)
    assert "the first layer 0 is Linear(4, 4): that is no convolution" in done.err
    assert not Path("o.pth").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--in-channels", 2, "-m", "fcos_resnet50_fpn"), "is a detection model, which scales and normalises"),
        (("--image-size", 96, "-m", "fcos_resnet50_fpn"), "is a detection model, which scales and normalises"),
        (
            ("--classes", 2, "-m", "raft_small"),
            "the library of raft_small does not say which module of RAFT is the classifier",
        ),
        (("-m", "resnet18"), "adapt takes at least one of --classes"),
        (("--classes", 0, "-m", "resnet18"), "0"),
        (("--classes", 2, "-m", "bare.pth"), "adapt needs an architecture, but bare.pth records none"),
    ],
)
def test_an_adaptation_that_does_not_apply_is_an_error_and_writes_nothing(
    cli: Cli, words: tuple[object, ...], message: str
) -> None:
    torch.save({"a": torch.zeros(1)}, "bare.pth")
    assert message in cli("adapt", *words, "-o", "o.pth", code=2).err
    assert not Path("o.pth").exists()


# --- image size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", sampled([96, 288], one_in=2))
def test_the_position_embeddings_are_those_of_torchvision(cli: Cli, size: int) -> None:
    model = torchvision.models.vision_transformer.VisionTransformer(224, 32, 1, 2, 64, 128)
    state = model.state_dict()
    torch.save(state, "m.pth")
    arch = "torchvision.models.vision_transformer:VisionTransformer(224,32,1,2,64,128)"
    words = ("-m", "m.pth", "--arch", arch, "--input-size", "1,3,224,224")
    done = cli("adapt", "--image-size", size, *words, "-o", "o.pth", "--json").json
    assert done["edits"] == [f"resize . image_size={size}"]
    assert done["check"]["input"] == [[1, 3, size, size]]
    found = torch.load("o.pth", weights_only=True)
    expected = torchvision.models.vision_transformer.interpolate_embeddings(size, 32, state)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    other = torchvision.models.vision_transformer.VisionTransformer(size, 32, 1, 2, 64, 128)
    other.load_state_dict(found)
    read = modelcli.load("o.pth")
    images = torch.randn(1, 3, size, size)
    assert torch.equal(read.eval()(images), other.eval()(images))
    Path("s.py").write_text(cli("script", "-e", done["edits"][0], *words, "-o", "s.pth").out)
    subprocess.run([sys.executable, "s.py"], check=True)
    assert torch.equal(torch.load("s.pth", weights_only=True)["encoder.pos_embedding"], found["encoder.pos_embedding"])


def test_a_size_that_the_patches_do_not_divide_is_refused(cli: Cli) -> None:
    done = cli("adapt", "--image-size", 230, "-m", "vit_b_32", "-o", "o.pth", code=2)
    assert "image_size=230 is no multiple of the patches of 32 pixels" in done.err
    assert "hint: 224 and 256 are" in done.err


def test_a_model_that_takes_any_size_needs_no_edit(cli: Cli) -> None:
    cli("load", "resnet18")
    done = cli("adapt", "--image-size", 320)
    assert "note: resnet18 takes images of 320x320 as it is: no edit is needed" in done.err
    assert "check:    runs: [1,3,320,320] -> [1,1000]" in done.out
    recipe = tomllib.loads(Path("modelcli.toml").read_text())
    assert (recipe["edits"], recipe["input_size"]) == ([], "1,3,320,320")


def test_an_image_size_that_the_model_cannot_take_is_an_error(cli: Cli, own: str) -> None:
    flat = "Sequential(Conv2d(3,4,3),Flatten(),Linear(144,5))"
    done = cli("adapt", "--image-size", 9, "-m", flat, "--input-size", "1,3,8,8", code=2)
    assert "does not take images of 9x9 as it is, and no library says how to change that" in done.err
    assert "its input is not known" in cli("adapt", "--image-size", 9, "-m", own, code=2).err
    assert (
        "takes no images" in cli("adapt", "--image-size", 9, "-m", "own.py:Normed", "--input-size", "1,4", code=2).err
    )


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_of_an_own_class_are_the_first_embedding_and_the_last_layer(cli: Cli, own: str) -> None:
    words = ("-m", "own.py:Language", "--input-size", "1,6", "--input-dtype", "int64")
    cli("save", "m.pth", *words)
    done = cli("adapt", "--vocab-size", 14, "-m", "m.pth", "-o", "o.pth", "--trust", "--json").json
    assert done["edits"] == ["resize embed out vocab_size=14"]
    assert done["check"]["output_shape"] == [1, 6, 14]
    before, found = (torch.load(name, weights_only=True) for name in ("m.pth", "o.pth"))
    assert all(torch.equal(found[key][:11], before[key]) for key in ("embed.weight", "out.weight", "out.bias"))
    assert torch.allclose(found["embed.weight"][11:], before["embed.weight"].mean(0), atol=1e-3)


def test_a_model_without_an_embedding_is_an_error(cli: Cli, own: str) -> None:
    done = cli("adapt", "--vocab-size", 9, "-m", own, "--input-size", "1,3,8,8", code=2)
    assert "the first layer first is Conv2d" in done.err
    assert "has no embedding of tokens" in cli("adapt", "--vocab-size", 9, "-m", "resnet18", code=2).err


# --- as every edit ---------------------------------------------------------------------------------------------------


def test_the_recipe_and_the_record_have_the_edits_and_not_adapt(cli: Cli) -> None:
    cli("load", "resnet18")
    cli("freeze", "layer1")
    done = cli("adapt", "--classes", 10, "--in-channels", 1)
    conv = "replace conv1 Conv2d(1,_,_,stride=_,padding=_,bias=_) --keep-weights=sum"
    assert done.out.splitlines()[:2] == ["replace fc Linear(_,10)", conv]
    assert "recorded:" in done.out
    recipe = tomllib.loads(Path("modelcli.toml").read_text())
    assert recipe["edits"] == ["freeze layer1", "replace fc Linear(_,10)", conv]
    assert recipe["input_size"] == "1,1,224,224"
    assert cli("log", "--json").json["edits"] == recipe["edits"]
    cli("save", "o.pth")
    record = cli("check", "o.pth", "--output-shape", "1,10")
    assert record.code == 0
    cli("undo")
    assert len(tomllib.loads(Path("modelcli.toml").read_text())["edits"]) == 2


def test_a_dry_run_changes_nothing(cli: Cli) -> None:
    cli("load", "resnet18")
    before = Path("modelcli.toml").read_text()
    done = cli("adapt", "--classes", 10, "--dry-run")
    assert "--dry-run changes nothing" in done.out
    assert Path("modelcli.toml").read_text() == before


def test_the_script_of_an_adaptation_gives_the_same_result(cli: Cli) -> None:
    cli("load", "resnet18")
    cli("adapt", "--classes", 10, "--in-channels", 1, "-o", "o.pth")
    Path("s.py").write_text(cli("script", "-o", "s.pth").out)
    subprocess.run([sys.executable, "s.py"], check=True)
    one, other = (torch.load(name, weights_only=True) for name in ("o.pth", "s.pth"))
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_adaptation_without_effect_makes_no_edit(cli: Cli) -> None:
    done = cli("adapt", "--classes", 1000, "--in-channels", 3, "-m", "resnet18", "-o", "o.pth")
    assert "note: fc has 1,000 classes already" in done.err
    assert "note: conv1 takes 3 channels already" in done.err
    assert torch.equal(
        torch.load("o.pth", weights_only=True)["fc.weight"], modelcli.load("resnet18").state_dict()["fc.weight"]
    )
    cli("load", "resnet18")
    before = Path("modelcli.toml").read_text()
    assert "not recorded: there is no edit" in cli("adapt", "--classes", 1000).out
    assert Path("modelcli.toml").read_text() == before

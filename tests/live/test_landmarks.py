"""`@head` and `@stem` are the layers that the library's own arguments (such as num_classes) change."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from modelcli.live import landmarks
from tests.conftest import Cli
from tests.sampling import sampled

#: One builder of each model class with `num_classes`. Detection models have lists of their own.
BUILDERS = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("mnasnet0_5", "maxvit_t", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "vit_b_16"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "mvit_v1_b", "r3d_18", "s3d", "swin3d_t"),
    *("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large", "quantized_resnet18", "quantized_googlenet"),
)
#: One builder of each class of detection model, whose number of classes is not the width of one layer.
DETECTORS = (
    *(
        "fasterrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn",
        "keypointrcnn_resnet50_fpn",
        "fasterrcnn_mobilenet_v3_large_fpn",
    ),
    *("retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)


def built(name: str, classes: int, device: str = "meta") -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    weights = {"weights": None} | (
        {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The constructor of regnets computes with values.
        with torch.device("cpu" if name.startswith("regnet") else device):
            made: nn.Module = builder(num_classes=classes, **weights)
            return made


@pytest.mark.parametrize("name", sampled([*BUILDERS, *DETECTORS], one_in=5))
def test_the_head_is_what_the_number_of_classes_changes(name: str) -> None:
    one, other = built(name, 1000), built(name, 7)
    shapes = {key: value.shape for key, value in one.state_dict().items()}
    changed = {key.rpartition(".")[0] for key, value in other.state_dict().items() if value.shape != shapes[key]}
    found = landmarks.of(one)
    assert set(found["head"]) == changed
    (stem,) = found["stem"]
    first = next(child for child in one.modules() if isinstance(child, nn.Conv2d | nn.Conv3d))
    assert one.get_submodule(stem) is first


def test_every_classifier_of_torchvision_has_a_head() -> None:
    from modelcli.live.providers.torchvision import _HEADS

    models = torchvision.models
    names = [*models.list_models(module=models), *models.list_models(module=models.video)]
    kinds = {inspect.signature(models.get_model_builder(name)).return_annotation for name in names}
    missing = {str(kind).rpartition(".")[2].strip("'>") for kind in kinds} - set(_HEADS)
    assert not missing
    detectors = {name.partition("_")[0] for name in models.list_models(module=models.detection)}
    assert detectors == {name.partition("_")[0] for name in DETECTORS}


def test_a_head_is_replaced_without_its_path(cli: Cli, folder: Path) -> None:
    cli("replace", "@head", "Linear(_,10)", "-m", "googlenet", "-o", "out.pth")
    state = torch.load("out.pth", weights_only=True)
    assert [state[f"{path}.weight"].shape[0] for path in ("fc", "aux1.fc2", "aux2.fc2")] == [10, 10, 10]
    assert cli("modules", "out.pth", "-s", "@head", "-f", "csv").out.count("Linear") == 3


def test_a_model_of_no_library_has_no_head(cli: Cli) -> None:
    told = cli("freeze", "@head", "-m", "nets.py:Net", "--dry-run", code=2).err
    assert "no library says which module of this model is the classifier (@head)" in told
    assert "modelcli modules lists them" in told


def test_a_removed_head_is_no_landmark_any_more(cli: Cli) -> None:
    told = cli("apply", "-m", "alexnet", "-e", "remove classifier.6", "-e", "freeze @head", "--dry-run", code=2).err
    assert "@head" in told


def test_a_new_child_of_the_head_is_named_below_it(cli: Cli) -> None:
    told = cli("add", "@head", "ReLU()", "-m", "resnet18", "--dry-run", code=2).err
    assert "write @head.NAME" in told
    assert "classifier.6.extra" in cli("add", "@head.extra", "ReLU()", "-m", "alexnet", "--dry-run").out


def test_completion_offers_both_words(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("modules", "resnet18")
    monkeypatch.setenv("_MODELCLI_COMPLETE", "complete_zsh_words")
    offered = [line.split("\t")[0] for line in cli("modules", "resnet18", "-s", "@").out.splitlines()]
    assert offered == ["@head", "@stem"]

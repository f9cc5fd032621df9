"""Names read from the sources of libraries equal those of the imported libraries."""

from __future__ import annotations

import torch
import torchvision

from modelcli.live.providers import torchvision as live
from modelcli.live.surgery import schemes
from modelcli.providers import torch_nn
from modelcli.providers.torchvision import PROVIDER


def test_the_builders_of_torchvision() -> None:
    assert PROVIDER.names() == torchvision.models.list_models() == live.builder_names()


def test_the_weights_of_torchvision() -> None:
    models = torchvision.models
    weights = {member for name in models.list_models() for member in models.get_model_weights(name).__members__}
    assert weights <= set(PROVIDER.weights_names())


def test_the_classes_of_torchvision() -> None:
    classes = {name for name, value in vars(torchvision.ops).items() if isinstance(value, type) and name[0].isupper()}
    assert set(PROVIDER.class_names()) == classes


def test_the_classes_and_schemes_of_torch() -> None:
    assert set(torch_nn.PROVIDER.class_names()) == set(torch.nn.modules.__all__)
    assert set(torch_nn.init_names()) == set(schemes.schemes_of_torch())

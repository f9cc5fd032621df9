"""The estimated peak compared with peaks of steps that torch really makes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from tests.gpu.measure_memory import Case
from tests.live.memory_use.measured import CASES, Inputs, estimated_peak, measured_peak

#: How far the estimate may be from the peak outside the kernels that make copies.
TOLERANCE = 0.01

#: Builders of torchvision with small arguments, and the size of their images.
BUILDERS = {
    "squeezenet1_1": 64,
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x1_0": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "densenet121": 64,
    "convnext_tiny": 64,
    "resnet50": 64,
    "swin_t": 64,
    "vit_b_16": 64,
}


def builder(name: str) -> tuple[Callable[[], nn.Module], Inputs]:
    size = BUILDERS[name]
    arguments = {"image_size": size} if name.startswith("vit") else {}
    return lambda: getattr(torchvision.models, name)(num_classes=10, **arguments), torch.randn(8, 3, size, size)


def language_model(name: str) -> tuple[Callable[[], nn.Module], Inputs]:
    """Return a small language model of transformers."""
    import transformers

    def make() -> nn.Module:
        common = {"vocab_size": 1000, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 128}
        if name == "bert":
            config = transformers.BertConfig(**common, intermediate_size=512)
            return transformers.BertForSequenceClassification(config)
        config = transformers.LlamaConfig(**common, intermediate_size=344, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config)

    tokens = torch.randint(0, 1000, (4, 64))
    return make, {"input_ids": tokens}


#: The pairs that `make test` runs; the others take longer.
QUICK = {
    ("squeezenet1_1", "adamw, autocast"),
    ("resnet18", "sgd-momentum"),
    ("mobilenet_v3_small", "inference"),
    ("bert", "adamw, head only"),
    ("llama", "adam"),
}


def pairs() -> list[Any]:
    """Return each model with each case; all but the quick ones are marked `sweep`."""
    return [
        pytest.param(
            name, case, marks=() if (name, case.name) in QUICK else pytest.mark.sweep, id=f"{name}-{case.name}"
        )
        for name in (*BUILDERS, "bert", "llama")
        for case in CASES
    ]


@pytest.mark.parametrize(("name", "case"), pairs())
def test_the_peak_is_that_of_a_real_step(name: str, case: Case) -> None:
    make, inputs = builder(name) if name in BUILDERS else language_model(name)
    measured = measured_peak(make, inputs, case)
    estimated = estimated_peak(make, inputs, case)
    assert estimated == pytest.approx(measured.outside, rel=TOLERANCE)
    assert estimated <= measured.peak * (1 + TOLERANCE)

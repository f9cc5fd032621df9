"""`identify` finds timm's models, and builds only those whose source contains the names in the keys."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest
import timm
import torch

from modelcli.commands import identify
from modelcli.providers.timm import PROVIDER, Timm
from tests.conftest import Cli


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Limit each group of candidates to two models, so that a test takes seconds. Returns the models that are built."""
    like, built = Timm.names_like, identify._built
    names: list[str] = []

    def names_like(self: Timm, keys: Collection[str]) -> list[list[str]]:
        return [[name for name in group if "xcit_nano" in name or "test_" in name][:2] for group in like(self, keys)]

    def build(chosen: Sequence[str], steps: identify.Steps) -> object:
        names.extend(name for name in chosen if name.startswith("timm:"))
        return built(chosen, steps) if not chosen or chosen[0].startswith("timm:") else ({}, {})

    monkeypatch.setattr(Timm, "names_like", names_like)
    monkeypatch.setattr(identify, "_built", build)
    return names


def test_a_file_is_identified_by_names_and_shapes(cli: Cli, few: list[str]) -> None:
    torch.save(timm.create_model("xcit_nano_12_p16_224").state_dict(), "bare.pth")
    document = cli("identify", "bare.pth", "--json").json
    both = ["timm:xcit_nano_12_p16_224", "timm:xcit_nano_12_p16_384"]  # no tensor's shape depends on the image size
    assert [match["model"] for match in document["matches"] if match["exact"]] == both
    assert few == both
    few.clear()
    assert "timm:xcit_nano_12_p16_224" in cli("identify", "bare.pth").out
    assert few == []
    assert "looks like timm:xcit_nano_12_p16_224" in cli("params", "bare.pth").err


def test_another_number_of_classes_is_shown_as_an_argument(cli: Cli, few: list[str]) -> None:
    torch.save(timm.create_model("xcit_nano_12_p16_224", num_classes=7).state_dict(), "bare.pth")
    assert "timm:xcit_nano_12_p16_224(num_classes=7) fits exactly" in cli("identify", "bare.pth").err


def test_showing_a_model_is_enough_to_identify_its_files(cli: Cli) -> None:
    cli("params", "timm:test_vit")
    torch.save(timm.create_model("test_vit").state_dict(), "bare.pth")
    assert "looks like timm:test_vit" in cli("params", "bare.pth").err


def test_no_timm_model_is_built_for_names_that_timm_lacks(cli: Cli, few: list[str]) -> None:
    torch.save({"quokka.weight": torch.zeros(2), "wombat.bias": torch.zeros(3)}, "bare.pth")
    cli("identify", "bare.pth", code=1)
    assert few == []
    assert PROVIDER.has_many_models

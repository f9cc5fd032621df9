"""`identify` finds timm's models, and builds only those whose source contains the names in the keys."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest
import timm
import torch

from modelcli.commands import identify
from modelcli.model import state_dict_match
from modelcli.providers.timm import PROVIDER, Timm
from tests.conftest import Cli


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Limit each group of candidates to two models, so that a test takes seconds. Returns the models that are built."""
    like, built = Timm.names_like, identify._built
    names: list[str] = []

    def names_like(self: Timm, keys: Collection[str]) -> list[list[str]]:
        return [[name for name in group if "xcit_nano" in name or "test_" in name][:2] for group in like(self, keys)]

    def build(chosen: Sequence[str], steps: identify.Steps, *limit: Any) -> object:
        names.extend(name for name in chosen if name.startswith("timm:") and name not in names)
        return built(chosen, steps, *limit) if not chosen or chosen[0].startswith("timm:") else ({}, {})

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


@pytest.mark.parametrize("classes", [1000, 7])
def test_giving_up_early_finds_what_building_all_finds(cli: Cli, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Models that share the first layers, the width or the depth, and models that share nothing."""
    names = ["xcit_nano_12_p16_224", "xcit_nano_12_p16_384", "xcit_nano_12_p8_224", "xcit_tiny_12_p16_224"]
    names += ["test_vit", "resnet18", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224"]
    every = {f"timm:{name}": shapes_of(timm.create_model(name, device="meta")) for name in names}
    given_up: list[str] = []
    within = identify._shapes_within

    def counted(reference: str, limit: Any) -> object:
        if (found := within(reference, limit)) is None:
            given_up.append(reference)
        return found

    monkeypatch.setattr(Timm, "names_like", lambda _self, _keys: [names])
    monkeypatch.setattr(identify, "_prefixes", lambda: ([], ()))
    monkeypatch.setattr(identify, "_shapes_within", counted)
    for name in ("xcit_tiny_12_p16_224", "deit_tiny_patch16_224"):
        given_up.clear()
        cli("cache", "clear")
        model = timm.create_model(name, num_classes=classes)
        torch.save(model.state_dict(), "bare.pth")
        expected = state_dict_match.best(shapes_of(model), every, identify.MOST)
        found = identify.identify(identify.IdentifyRequest("bare.pth")).matches
        assert [(match.model, match.distance) for match in found] == [(m.model, m.distance) for m in expected]
        assert "timm:resnet18" in given_up


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}

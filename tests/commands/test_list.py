"""`list`: what libraries publish about their models is read once, and then cached for their versions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelcli import installed
from modelcli.commands import blueprint_cache
from modelcli.commands.list import ListRequest, named_models
from modelcli.errors import RequestError, SystemFailureError
from modelcli.providers.base import Provider
from modelcli.providers.published import PublishedModel
from tests.conftest import Cli

#: A program that runs a command line and prints which libraries it imported.
PROGRAM = """
import sys
from modelcli.cli import main
code = main(sys.argv[1:])
print(*sorted({"torch", "torchvision"} & sys.modules.keys()))
sys.exit(code)
"""


def listed_apart(*words: str, code: int = 0) -> tuple[str, list[str]]:
    """Run `list` in a process of its own. Returns its output and the libraries that it imported."""
    run = [sys.executable, "-c", PROGRAM, "list", *words]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    *lines, imported = done.stdout.split("\n")[:-1]
    return "\n".join(lines), imported.split()


def test_only_the_first_list_imports_torch(cli: Cli) -> None:
    first, imported = listed_apart("--json")
    assert imported == ["torch", "torchvision"]
    again, imported = listed_apart("--json")
    assert imported == []
    assert again == first
    from torchvision import models

    assert [model["name"] for model in json.loads(again)["models"]] == models.list_models()
    some, imported = listed_apart("vgg1?")
    assert imported == []
    assert some.splitlines()[-1].split() == ["Builders:", "4"]
    assert listed_apart("alexnt", code=2)[1] == []


def test_a_list_with_a_pattern_caches_all_models(cli: Cli) -> None:
    assert listed_apart("alexnet", "--json")[1] == ["torch", "torchvision"]
    everything, imported = listed_apart("--json")
    assert imported == []
    assert len(json.loads(everything)["models"]) > 100


class Zoo(Provider):
    """The provider of an imaginary library."""

    name = "zoo"
    live = "tests.commands.test_list:LiveZoo"
    prefix = "zoo"
    has_names = True
    packages = ("zoo-models",)


class LiveZoo:
    """The torch half of that provider, which counts how often the library is queried."""

    asked = 0

    def __init__(self, provider: Provider) -> None:
        pass

    def names(self) -> list[str]:
        type(self).asked += 1
        return ["ant", "bee"]

    def reference_to(self, name: str) -> str:
        return f"zoo:{name}"

    def published(self, name: str) -> PublishedModel:
        return PublishedModel(name, "insects", ("DEFAULT", "WILD"), len(name), None)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Mapping[str, str]:
    """Install the provider above. Returns the versions of installed packages, which a test may change."""
    from modelcli import providers

    found: dict[str, Any] = {"zoo-models": "1.0"}
    real = installed.version
    monkeypatch.setattr(installed, "version", lambda package: found[package] if package in found else real(package))
    monkeypatch.setitem(providers._LOADED, "zoo", Zoo())
    monkeypatch.setattr(LiveZoo, "asked", 0)
    return found


def test_a_new_version_of_a_library_is_queried_again(versions: dict[str, Any]) -> None:
    first = named_models(ListRequest("zoo:*"))
    assert [model.name for model in first.models] == ["zoo:ant", "zoo:bee"]
    assert first.models[0] == PublishedModel("zoo:ant", "insects", ("DEFAULT", "WILD"), 3, None)
    assert named_models(ListRequest("zoo:*")) == first
    assert named_models(ListRequest("zoo:b*")).models == first.models[1:]
    assert LiveZoo.asked == 1
    versions["zoo-models"] = "1.1"
    assert named_models(ListRequest("zoo:*")) == first
    assert LiveZoo.asked == 2


@pytest.mark.parametrize("reason", ["no version", "no packages", "no cache"])
def test_a_library_that_cannot_be_cached_is_queried_each_time(
    versions: dict[str, Any], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "no version":
        versions["zoo-models"] = None
    elif reason == "no packages":
        monkeypatch.setattr(Zoo, "packages", ())
    else:
        monkeypatch.setenv("MODELCLI_NO_CACHE", "1")
    for _ in range(2):
        assert len(named_models(ListRequest("zoo:*")).models) == 2
    assert LiveZoo.asked == 2


def test_invalid_cached_models_are_queried_again(versions: dict[str, Any]) -> None:
    values: list[Any] = [None, 3, [3], [{}], [{"weights": []}], {"a": 1}]
    for wrong in values:
        blueprint_cache.put_index("published models of zoo", wrong, "zoo")
        assert len(named_models(ListRequest("zoo:*")).models) == 2


def test_a_model_that_fails_does_not_hide_others(versions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def published(_half: LiveZoo, name: str) -> PublishedModel:
        if name == "bee":
            raise SystemFailureError("bee is broken")
        return PublishedModel(name)

    with monkeypatch.context() as broken:
        broken.setattr(LiveZoo, "published", published)
        found = named_models(ListRequest("zoo:*"))
        assert [model.name for model in found.models] == ["zoo:ant"]
        assert found.notes == ("bee is broken",)
        with pytest.raises(RequestError) as error:
            named_models(ListRequest("zoo:wasp"))
        assert "bee is broken" in (error.value.hint or "")
    assert len(named_models(ListRequest("zoo:*")).models) == 2

"""The supported versions are the same wherever the project states them, and no modules import each other."""

from __future__ import annotations

import graphlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import grimp
import pytest
import torch
import torchvision

from tests.needs import COMPLETE

ROOT = Path(__file__).parents[1]


def test_the_makefile_tests_the_oldest_versions_that_pyproject_allows() -> None:
    stated = re.search(r"^OLDEST +:= torch==(\S+) torchvision==(\S+)$", text("Makefile"), re.MULTILINE)
    assert stated is not None
    assert [first_two(version) for version in stated.groups()] == [bound("torch"), bound("torchvision")]


def test_the_readme_states_the_oldest_versions() -> None:
    page = " ".join(text("README.md").split())
    tested = re.search(r"`make test-oldest` runs the tests on torch (\S+) and torchvision (\S+), the oldest that", page)
    assert tested is not None
    assert list(tested.groups()) == [bound("torch"), bound("torchvision")]
    needed = re.search(r"needs Python (\S+) or later, and torch (\S+) or later", page)
    assert needed is not None
    assert list(needed.groups()) == [project()["requires-python"].removeprefix(">="), bound("torch")]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "Makefile"])
def test_the_oldest_python_is_the_same_on_every_page(page: str) -> None:
    oldest = project()["requires-python"].removeprefix(">=")
    found = set(re.findall(r"Python (3\.\d+)(?: or later|\+)", text(page)))
    assert found == {oldest}


def test_every_python_from_the_oldest_on_has_its_classifier() -> None:
    named = [re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line) for line in project()["classifiers"]]
    minors = [int(found[1]) for found in named if found]
    oldest = int(project()["requires-python"].removeprefix(">=3."))
    assert minors == list(range(oldest, oldest + len(minors)))
    assert sys.version_info[1] in minors


def test_the_versions_that_run_the_tests_are_allowed() -> None:
    assert numbers(torch.__version__) >= numbers(bound("torch"))
    assert numbers(torchvision.__version__) >= numbers(bound("torchvision"))
    assert numbers(bound("torch")) < COMPLETE  # otherwise no test may be skipped, and `tests/needs.py` is not needed


def project() -> Any:
    return tomllib.loads(text("pyproject.toml"))["project"]


def bound(package: str) -> str:
    """Return the oldest version of a package that pyproject.toml allows."""
    (found,) = (line for line in project()["dependencies"] if re.match(rf"{package}\b", line))
    return found.removeprefix(f"{package}>=").partition(",")[0]


def first_two(version: str) -> str:
    return ".".join(version.split(".")[:2])


def numbers(version: str) -> tuple[int, ...]:
    """Return the first two parts of a version as integers."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count. Imports under TYPE_CHECKING do not."""
    graph = grimp.build_graph("modelcli", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "modelcli.live.opening" in imports
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))

"""The registry of providers: the built-in ones, those of other packages, and which modules may name a library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import modelcli
from modelcli import providers

SOURCE = Path(modelcli.__file__).parent
OWN = {
    SOURCE / "providers" / "torchvision.py",
    SOURCE / "live" / "providers" / "torchvision.py",
    SOURCE / "live" / "providers" / "torchvision_detection.py",
}
#: The line by which the registry finds it.
LINE = '"modelcli.providers.torchvision",'


def test_no_other_file_names_torchvision() -> None:
    """Docstrings and help texts may not name it either: only its provider does."""
    registry = SOURCE / "providers" / "__init__.py"
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py") if path not in OWN}
    assert texts[registry].count(LINE) == 1
    texts[registry] = texts[registry].replace(LINE, "")
    assert [str(path.relative_to(SOURCE)) for path, text in texts.items() if "torchvision" in text.lower()] == []


def test_no_other_module_compares_names_of_builders() -> None:
    """Names of builders occur only in examples and hints. No code compares with one or looks one up."""
    used = re.compile(r"([=!]=|\bin|\[|case) *\(?\"(alexnet|resnet\w*|vgg\w*|googlenet|raft\w*|fasterrcnn\w*)\"")
    files = [path for path in SOURCE.rglob("*.py") if path not in OWN]
    assert used.search('if name == "alexnet"') is not None
    assert [path.name for path in files if used.search(path.read_text(encoding="utf-8"))] == []


def test_the_built_in_providers() -> None:
    assert [provider.name for provider in providers.built_in()] == ["torchvision", "torch.nn", "Python"]
    assert providers.packages() == ("torch", "torchvision")
    assert providers.class_packages() == "torch.nn or torchvision.ops"
    assert all(provider.prefix is None for provider in providers.built_in())


@pytest.mark.parametrize(
    ("package", "owner"),
    [
        ("", "torch.nn"),
        ("torch", "torch.nn"),
        ("torch.nn", "torch.nn"),
        ("torchvision.ops", "torchvision"),
        ("torchvision.models", "torchvision"),
        ("torchvision.models.detection.faster_rcnn", "torchvision"),
        ("torchvision", None),
        ("torchvision.modelsx", None),
        ("torch.hub", None),
        ("os", None),
    ],
)
def test_who_owns_a_package(package: str, owner: str | None) -> None:
    found = providers.owner(package)
    assert (found.name if found is not None else None) == owner


def test_an_expression_of_torch_nn_needs_no_other_library(folder: Path) -> None:
    """Showing and writing it do not import torchvision, which takes as long to import as torch."""
    code = (
        "import sys; from modelcli.cli import main; words = 'Sequential(Linear(2,3),ReLU())'\n"
        "assert main(['summary', words, '--input-size', '1,2']) == main(['save', 'out.pth', '-m', words]) == 0\n"
        "assert main(['params', 'ReLU']) == 0\n"
        "print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_showing_a_plain_file_imports_at_most_declarations(folder: Path) -> None:
    """The declarations give the versions that the fingerprints of known models depend on. No library is parsed."""
    import torch

    torch.save({"a": torch.zeros(2)}, "plain.pth")
    code = "import sys; from modelcli.cli import main; assert main(['params', 'plain.pth']) == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "modelcli.resolve" in loaded
    others = r"modelcli\.(providers\.known_code|language\.expressions|live)|importlib\.metadata|modelcli_plugin"
    assert not {name for name in loaded if re.match(others, name)}

"""What is installed: versions and names, found without importing anything.

Names are read off the source of torch and torchvision, which takes 30 ms where the import takes seconds. They are for
completing words: what is right is decided by the packages themselves.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path


def version(package: str) -> str | None:
    """The version of an installed package, or None: from the name of its `.dist-info` folder, as PEP 427 has it."""
    start = f"{package.replace('-', '_')}-"
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")  # noqa: PTH208 -- pathlib is slower to start
        except OSError:
            continue
        for name in names:
            if name.startswith(start) and name.endswith(".dist-info"):
                return name[len(start) : -len(".dist-info")]
    from importlib import metadata  # for what is installed in another way: an egg, a zip

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def builder_names() -> list[str]:
    """What `torchvision.models.list_models()` gives: the functions that its sources register."""
    registered = re.compile(r"^@register_model\((?:name=\"(\w+)\")?\)$.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)
    return sorted(name or function for text in _model_sources() for name, function in registered.findall(text))


def weights_names() -> list[str]:
    """Every name that weights of a builder of torchvision's have."""
    members = re.compile(r"^    ([A-Z][A-Z0-9_]+) = (?:Weights\(|[A-Z])", re.MULTILINE)
    return sorted({name for text in _model_sources() for name in members.findall(text)})


def module_names() -> list[str]:
    """The classes that `torch.nn` lists."""
    text = _source("torch", "nn/modules/__init__.py")
    return re.findall(r'^    "(\w+)",$', text.partition("__all__")[2], re.MULTILINE)


def init_names() -> list[str]:
    """The functions of `torch.nn.init` that fill a tensor, without their underscore."""
    return re.findall(r"^def ([a-z]\w*)_\(", _source("torch", "nn/init.py"), re.MULTILINE)


def _model_sources() -> Iterator[str]:
    folder = _folder("torchvision")
    for path in sorted((folder / "models").rglob("*.py")) if folder is not None else ():
        yield path.read_text(encoding="utf-8")


def _source(package: str, path: str) -> str:
    folder = _folder(package)
    return "" if folder is None or not (folder / path).is_file() else (folder / path).read_text(encoding="utf-8")


def _folder(package: str) -> Path | None:
    """Where a package lies, or None."""
    from importlib import util

    spec = util.find_spec(package)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])

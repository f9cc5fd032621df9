"""What is installed: versions and source texts of packages, found without importing any of them."""

from __future__ import annotations

import os
import sys
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


def source(package: str, path: str) -> str:
    """The text of a file of an installed package, or nothing where there is none."""
    found = folder(package)
    return "" if found is None or not (found / path).is_file() else (found / path).read_text(encoding="utf-8")


def folder(package: str) -> Path | None:
    """Where a package lies, or None."""
    from importlib import util

    spec = util.find_spec(package)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])

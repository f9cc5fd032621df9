"""Which versions of packages are installed, found without importing them: `importlib.metadata` takes 30 ms to start."""

from __future__ import annotations

import os
import sys


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

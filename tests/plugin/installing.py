"""Installs packages as pip would, for this process or for one that it starts; without network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


def installed(folder: Path) -> list[Path]:
    """Install the package of this folder, and give the folders for `sys.path`.

    The entry points are those of its `pyproject.toml`.
    """
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    register(folder, project["name"], project["version"], project["entry-points"])
    return [folder, HERE / "src"]


def register(folder: Path, name: str, version: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
    """Write into a folder what an installer writes about a package."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (about / "INSTALLER").write_text("tests\n", encoding="utf-8")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items()), ""]
    (about / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


class Asked(NamedTuple):
    """What a command did with the packages that add to modelcli.

    Attributes:
        code: its exit code.
        groups: the groups whose entry points were read.
        imported: whether the package of this folder was imported.
    """

    code: int
    groups: set[str]
    imported: bool


_WATCHED = """
import importlib.metadata, json, sys
from modelcli.cli import main
asked = []
whole = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **group: asked.append(group["group"]) or whole(**group)
code = main(sys.argv[1:])
print(json.dumps([code, asked, "modelcli_plugin" in sys.modules]), file=sys.stderr)
"""


def asked_by(site: list[Path], *words: str) -> Asked:
    """Run a command in a process of its own, where the folders `site` are importable."""
    path = os.pathsep.join(map(str, [*site, *filter(None, [os.environ.get("PYTHONPATH")])]))
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    code, groups, imported = json.loads(done.stderr.splitlines()[-1])
    return Asked(code, set(groups), imported)

"""Installs the package of this folder as pip would, for this process or for one that it starts; without network."""

from __future__ import annotations

import tomllib
from pathlib import Path

HERE = Path(__file__).parent


def installed(folder: Path) -> list[Path]:
    """Write into a folder what an installer writes about the package, and give the folders for `sys.path`.

    The entry points are those of its `pyproject.toml`.
    """
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    name, version = project["name"], project["version"]
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (about / "INSTALLER").write_text("tests\n", encoding="utf-8")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    (about / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return [folder, HERE / "src"]

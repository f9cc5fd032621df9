"""Paths of modules and names of tensors. The root is `""` here, and `.` in output."""

from __future__ import annotations

from collections.abc import Container, Iterator

ROOT = "."


def shown(path: str) -> str:
    """Return the path as output shows it: `.` for the root."""
    return path or ROOT


def called(path: str) -> str:
    """Return the path as a sentence names its module: `the model` for the root."""
    return path or "the model"


def parent_of(path: str) -> str:
    """Return the path of the module that holds this module or tensor; `""` for a name without a dot."""
    return path.rpartition(".")[0]


def joined(parent: str, name: str) -> str:
    """Return the path of the child `name` of the module at `parent`."""
    return f"{parent}.{name}" if parent else name


def ancestors(path: str) -> Iterator[str]:
    """Yield the path itself and the path of every module above it, the root last."""
    while path:
        yield path
        path = parent_of(path)
    yield ""


def lies_in(path: str, paths: Container[str]) -> bool:
    """Whether a path is one of `paths`, or below one of them."""
    return any(above in paths for above in ancestors(path))

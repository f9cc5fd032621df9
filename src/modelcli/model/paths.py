"""Paths of modules and names of tensors: the root is `""` here and `.` on a screen."""

from __future__ import annotations

from collections.abc import Container, Iterator

ROOT = "."


def shown(path: str) -> str:
    """The path as a person reads it: `.` for the root."""
    return path or ROOT


def parent_of(path: str) -> str:
    """The path of the module that holds this module or tensor; the root holds what has no dot."""
    return path.rpartition(".")[0]


def joined(parent: str, name: str) -> str:
    """The path of what is called `name` in the module at `parent`."""
    return f"{parent}.{name}" if parent else name


def ancestors(path: str) -> Iterator[str]:
    """The path itself and every module above it, the root last."""
    while path:
        yield path
        path = parent_of(path)
    yield ""


def lies_in(path: str, paths: Container[str]) -> bool:
    """Whether a path is one of these, or below one."""
    return any(above in paths for above in ancestors(path))

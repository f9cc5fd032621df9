"""The modules of a model that `@head` (the classifier) and `@stem` (the first layer) name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from modelcli.live import providers


def of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the paths of these modules, by `head` and `stem`, as the first provider that knows the model gives them.

    Paths of modules that an edit has removed are left out, and so is a word without paths.
    """
    for half in providers.in_use():
        if found := half.landmarks(module):
            return existing(module, found)
    return {}


def existing(module: nn.Module, found: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Return those of the paths that exist in the model."""
    kept = {word: tuple(path for path in paths if _has(module, path)) for word, paths in found.items()}
    return {word: paths for word, paths in kept.items() if paths}


def _has(module: nn.Module, path: str) -> bool:
    child: nn.Module | None = module
    for name in path.split("."):
        child = None if child is None else child._modules.get(name)
    return child is not None

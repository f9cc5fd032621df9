"""Inspect PyTorch models and operate on them. `modelcli.load("best.pth")` gives the model back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelcli._version import __version__

if TYPE_CHECKING:
    from modelcli.api import apply, blueprint, load, save

__all__ = ["__version__", "apply", "blueprint", "load", "save"]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in __all__:
            from modelcli import api

            return getattr(api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

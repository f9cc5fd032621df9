"""Inspect PyTorch models and operate on them. `modelcli.load("best.pth")` gives the model back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelcli._version import __version__

if TYPE_CHECKING:
    from modelcli.api import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from modelcli.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

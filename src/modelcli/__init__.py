"""Inspect and edit PyTorch models. `modelcli.load("best.pth")` gives the model back."""

# Nothing of Python's own library is imported here: `python -m modelcli` comes here while the current folder is still
# the first place to search (see __main__), and a `typing.py` that lies in it would run.
from modelcli._version import __version__

TYPE_CHECKING = False  # as in `typing`: a type checker takes it for true
if TYPE_CHECKING:
    from modelcli.commands.python_api import apply, blueprint, load, save

__all__ = ["__version__", "apply", "blueprint", "load", "save"]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> object:
        if name in __all__:
            from modelcli.commands import python_api

            return getattr(python_api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

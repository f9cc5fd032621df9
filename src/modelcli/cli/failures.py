"""What the system, and not the request, is to blame for: a package that is not there, or no memory to load it."""

from __future__ import annotations

import sys
from types import TracebackType

from modelcli.errors import SystemFailureError

#: What a plain look at a checkpoint does without, beside the libraries of providers.
_PACKAGES = ("torch", "torchinfo", "numpy", "safetensors", "timm", "transformers")


def _packages() -> tuple[str, ...]:
    from modelcli import providers

    others = (package.replace("-", "_") for provider in providers.loaded() for package in provider.packages)
    return (*_PACKAGES, *providers.packages(), *others)


def imported_at(error: BaseException) -> str | None:
    """The package in whose import an error came up, the first of several in one another; None where in none."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in _packages():
        return error.name.partition(".")[0]
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and package in _packages():
            return package
        trace = trace.tb_next
    return None


def of_import(package: str, error: BaseException) -> SystemFailureError:
    """What to tell of a package that is not installed, or cannot be loaded."""
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
    if missing:
        return SystemFailureError(
            f"this needs {package}: pip install {package}",
            f"it is not installed for {sys.executable}; a look at a checkpoint needs no torch",
        )
    if isinstance(error, ModuleNotFoundError):
        return SystemFailureError(
            f"{package} cannot be imported: it needs {error.name}, which is not installed",
            f"{sys.executable} -m pip install {error.name}",
        )
    told = f"{package} cannot be imported: {type(error).__name__}: {error}"
    if (limit := _memory_limit()) is not None:
        return SystemFailureError(
            told, f"{limit}, and torch takes some 4 GB of addresses to load: ulimit -v unlimited lifts the limit"
        )
    return SystemFailureError(told, f"{sys.executable} -c 'import {package}' shows more: it may be installed in part")


def of_memory() -> SystemFailureError:
    """What to tell where memory has run out."""
    if (limit := _memory_limit()) is not None:
        return SystemFailureError("not enough memory", f"{limit}: ulimit -v unlimited lifts the limit")
    return SystemFailureError("not enough memory", "the system has no more of it for this program")


def _memory_limit() -> str | None:
    """What limits the addresses of this process, if anything does."""
    try:
        import resource
    except ImportError:  # no POSIX
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else f"a limit of {limit / 1e6:,.0f} MB of memory is set"

"""Errors that the user's request does not cause: a missing package, no memory, another package's code, a bug."""

from __future__ import annotations

import sys
from types import TracebackType

from modelcli.errors import SystemFailureError

#: Packages that are not needed to show a checkpoint, besides the libraries of providers.
_PACKAGES = ("torch", "torchinfo", "numpy", "safetensors", "timm", "transformers")


def _packages() -> tuple[str, ...]:
    from modelcli import providers

    others = (package.replace("-", "_") for provider in providers.loaded() for package in provider.packages)
    return (*_PACKAGES, *providers.packages(), *others)


def imported_at(error: BaseException) -> str | None:
    """Return the package whose import raised the error, the outermost one of nested imports; None if no import did."""
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
    """Return the error for a package that is not installed or cannot be imported."""
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
    if missing:
        return SystemFailureError(
            f"this needs {package}: pip install {package}",
            f"it is not installed for {sys.executable}; showing a checkpoint needs no torch",
        )
    if isinstance(error, ModuleNotFoundError):
        return SystemFailureError(
            f"{package} cannot be imported: it needs {error.name}, which is not installed",
            f"{sys.executable} -m pip install {error.name}",
        )
    problem = f"{package} cannot be imported: {type(error).__name__}: {error}"
    if (limit := _memory_limit()) is not None:
        return SystemFailureError(
            problem, f"{limit}, but torch needs about 4 GB of address space: ulimit -v unlimited removes the limit"
        )
    return SystemFailureError(
        problem, f"{sys.executable} -c 'import {package}' shows more: the installation may be incomplete"
    )


def of_plug_in(error: BaseException, *, debug: bool) -> SystemFailureError | None:
    """Return the error for an exception that the code of another package raised; None if no such code was running."""
    from modelcli import plug_ins

    if (package := plug_ins.at_fault(error)) is None:
        return None
    what = f"ended the program: exit code {error.code}" if isinstance(error, SystemExit) else _describe(error)
    failure = SystemFailureError(
        f"{package}, which adds to modelcli, failed: {what}",
        f"{'' if debug else '--debug shows the traceback; '}report it to the authors of {package}, or uninstall it",
    )
    failure.kind = "plug-in"
    return failure


def of_bug(error: BaseException, *, debug: bool) -> SystemFailureError:
    """Return the error for an exception that nothing else explains."""
    failure = SystemFailureError(
        f"a bug in modelcli: {_describe(error)}", None if debug else "--debug shows the traceback; please report it"
    )
    failure.kind = "internal"
    return failure


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def of_memory() -> SystemFailureError:
    """Return the error for exhausted memory."""
    if (limit := _memory_limit()) is not None:
        return SystemFailureError("not enough memory", f"{limit}: ulimit -v unlimited removes the limit")
    return SystemFailureError("not enough memory", "the system has no more memory for this program")


def _memory_limit() -> str | None:
    """Return a text about the limit on this process's address space, if there is one."""
    try:
        import resource
    except ImportError:  # not on POSIX
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else f"a limit of {limit / 1e6:,.0f} MB of memory is set"

"""The entry point of the `modelcli` program. From here on, Ctrl-C ends it silently, even during imports."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def _report(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Show an exception that nobody caught, unless it is Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        _end()
    sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


def _end() -> NoReturn:
    """End the process at once. No work is unfinished: it has not begun, or has been undone by now."""
    os._exit(130)  # interrupts.INTERRUPTED, which may not be imported yet


# Before anything else is imported: Python has imported `os` and `sys` already, and every other import takes time, in
# which Ctrl-C would show a traceback.
sys.excepthook = _report


def run() -> None:
    """Run the `modelcli` program. (The Python API does not call this.)"""
    try:
        import gc

        # 100,000 tensors are millions of objects that live as long as the program. Searching them for garbage again and
        # again takes a third of the time.
        gc.set_threshold(100_000, 50, 100)
        from modelcli.cli import run as carry_out

        carry_out()
    except KeyboardInterrupt:
        _end()
    except ImportError:
        # Ctrl-C during the import of a compiled module raises ImportError.
        from modelcli.interrupts import asked_to_end

        if asked_to_end:
            _end()
        raise

"""The entry point of the `modelcli` program. From here on, Ctrl-C ends it silently, even during imports."""

import gc
import os
import sys
from typing import NoReturn

from modelcli.interrupts import INTERRUPTED, asked_to_end


def run() -> None:
    """Run the `modelcli` program. (The Python API does not call this.)"""
    try:
        sys.excepthook = _report
        # 100,000 tensors are millions of objects that live as long as the program. Searching them for garbage again and
        # again takes a third of the time.
        gc.set_threshold(100_000, 50, 100)
        from modelcli.cli import run as carry_out

        carry_out()
    except KeyboardInterrupt:
        _end()
    except ImportError:
        # Ctrl-C during the import of a compiled module raises ImportError.
        if asked_to_end:
            _end()
        raise


def _report(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Show an exception that nobody caught, unless it is Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        _end()
    sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


def _end() -> NoReturn:
    """End the process at once. No work is unfinished: it has not begun, or has been undone by now."""
    os._exit(INTERRUPTED)

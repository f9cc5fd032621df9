"""The first step of the `modelcli` program: Ctrl-C ends it quietly from here on, in the imports of the program too."""

import gc
import os
import sys
from typing import NoReturn

from modelcli.interrupts import INTERRUPTED, asked_to_end


def run() -> None:
    """The `modelcli` program. What imports modelcli as a library never comes here."""
    try:
        sys.excepthook = _report
        # 100,000 tensors are millions of objects that live as long as the program: to look through them for garbage
        # again and again takes a third of its time.
        gc.set_threshold(100_000, 50, 100)
        from modelcli.cli import run as carry_out

        carry_out()
    except KeyboardInterrupt:
        _end()
    except ImportError:
        # Ctrl-C in the import of a compiled module comes out as one.
        if asked_to_end:
            _end()
        raise


def _report(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Show an exception that nobody caught, unless it is Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        _end()
    sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


def _end() -> NoReturn:
    """End at once: nothing has been begun that would have to be taken back, or it has been by now."""
    os._exit(INTERRUPTED)

"""Progress of long work over bytes: a bar on standard error where that is a terminal, nothing anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from modelcli.cli.options import OutputOptions

if TYPE_CHECKING:
    from rich.progress import Progress

#: Seconds that work may take before it is worth a bar.
MOMENT = 0.5


@contextmanager
def of_bytes(options: OutputOptions) -> Iterator[Callable[[int, int], None]]:
    """What takes how many bytes are done and how many there are; the bar comes after a moment, and goes at the end."""
    if options.quiet or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    with ExitStack() as stack:
        began: float | None = None
        bar: Progress | None = None

        def report(done: int, total: int) -> None:
            nonlocal began, bar
            now = time.monotonic()
            began = now if began is None else began
            if bar is None and now - began > MOMENT:
                bar = stack.enter_context(_bar())
                bar.add_task("", total=total)
            if bar is not None:
                bar.update(bar.tasks[0].id, completed=done)

        yield report


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        # Rich would put back the streams that it found, and they are others while a model's code runs.
        redirect_stdout=False,
        redirect_stderr=False,
    )

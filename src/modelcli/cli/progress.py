"""Progress bars for long work, on standard error if that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from modelcli.cli.options import OutputOptions

if TYPE_CHECKING:
    from rich.progress import Progress

#: Seconds before a bar appears.
MOMENT = 0.5


@contextmanager
def of_bytes(options: OutputOptions) -> Iterator[Callable[..., None]]:
    """Yield a function that reports progress: bytes done, bytes in total, and the kind of work.

    The bar appears after a moment, starts again for another kind of work, and disappears at the end.
    """
    if options.quiet or not sys.stderr.isatty():
        yield lambda _done, _total, _doing="": None
        return
    with ExitStack() as stack:
        began: float | None = None
        bar: Progress | None = None

        def report(done: int, total: int, doing: str = "reading") -> None:
            nonlocal began, bar
            now = time.monotonic()
            began = now if began is None else began
            if bar is None and now - began > MOMENT:
                bar = stack.enter_context(_bar())
            if bar is not None:
                task = next((task for task in bar.tasks if task.description == doing), None)
                if task is None:
                    for other in bar.task_ids:
                        bar.remove_task(other)
                bar.update(task.id if task else bar.add_task(doing, total=total), completed=done)

        yield report


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        # Rich would restore the streams that it found, but they are different ones while a model's code runs.
        redirect_stdout=False,
        redirect_stderr=False,
    )


def of_names(names: Sequence[str], options: OutputOptions) -> Iterable[str]:
    """Yield the names one after another, with a progress bar on a terminal."""
    if options.quiet or not sys.stderr.isatty():
        return names
    return _with_bar(names)


def _with_bar(names: Sequence[str]) -> Iterator[str]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name)
            yield name
            bar.advance(task)

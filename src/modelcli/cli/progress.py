"""Progress of long work: a bar on standard error where that is a terminal, nothing anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from modelcli.cli.options import OutputOptions

if TYPE_CHECKING:
    from rich.progress import Progress

#: Seconds that work may take before it is worth a bar.
MOMENT = 0.5


@contextmanager
def of_bytes(options: OutputOptions) -> Iterator[Callable[..., None]]:
    """What takes how many bytes are done, how many there are, and what is being done with them.

    The bar comes after a moment, starts anew for another kind of work, and goes at the end.
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
        # Rich would put back the streams that it found, and they are others while a model's code runs.
        redirect_stdout=False,
        redirect_stderr=False,
    )


def of_names(names: Sequence[str], options: OutputOptions) -> Iterable[str]:
    """The names of what is worked off one after another, with a bar where that is watched."""
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

"""Carry out a command on several ranks: those of torchrun, which are there already, or the workers of `--jobs`.

Rank 0 is the only one that prints. The others tell it their errors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from modelcli import ranks
from modelcli.errors import ModelcliError, RequestError
from modelcli.interrupts import advice
from modelcli.ranks import GroupEndedError, RestingError

if TYPE_CHECKING:
    from modelcli.ranks.connected import Connected

#: More processes than any machine has processors are a typing error.
MOST_JOBS = 512
#: Variables without one of which a process works by itself: see `ranks.starting`.
_STARTED_AS_RANK = {"RANK", "MODELCLI_WORKER"}

_words: ContextVar[Sequence[str]] = ContextVar("words", default=())


def carried_out(
    words: Sequence[str], attempt: Callable[[], int], report: Callable[[ModelcliError], int], *, debug: bool
) -> int:
    """Carry out a command line in the group of this process, if it is in one. Returns the exit code.

    Args:
        words: the command line.
        attempt: carries it out, and returns the exit code. It reports errors with `reported`.
        report: reports an error, and returns its exit code.
        debug: whether other ranks than 0 may write on standard error.
    """
    _words.set(words)
    try:
        group = _joined(is_quiet=not {"-q", "--quiet"}.isdisjoint(words))
    except ModelcliError as error:
        return report(error)
    if group is None:
        return _guarded(attempt, report)
    with ranks.entered(group):
        if group.rank:
            group.silence(errors=not debug)
            with contextlib.suppress(RestingError, GroupEndedError):  # rank 0 reports what ends the group
                code = attempt()
                if group.is_failing:
                    return code if group.is_cause else 0  # torchrun names the first rank that ends with another code
            group.leave()
            return 0
        try:
            return _guarded(attempt, report)
        finally:
            group.finish()


def _guarded(attempt: Callable[[], int], report: Callable[[ModelcliError], int]) -> int:
    try:
        return attempt()
    except GroupEndedError as ended:
        ended.error.notes = (*ended.error.notes, *advice)
        advice.clear()
        return report(ended.error)


def _joined(*, is_quiet: bool) -> Connected | None:
    """Return the group of this process; None if it works by itself, of which a note may tell."""
    if not _STARTED_AS_RANK & os.environ.keys():
        return None
    from modelcli.cli import output
    from modelcli.ranks import starting

    def tell(note: str) -> None:
        if not is_quiet:
            output.tell(f"note: {note}")

    if (place := starting.place(tell)) is None:
        return None
    if place.port is not None:
        return starting.joined(place)
    from modelcli.live.rendezvous import Rendezvous
    from modelcli.ranks.connected import timeout_from_environment

    return starting.joined(place, Rendezvous(place, timeout_from_environment()).share)


def reported(error: ModelcliError) -> bool:
    """Tell rank 0 an error of this rank. Returns False on rank 0, which reports its own errors."""
    group = ranks.current()
    if group.rank:
        group.fail(error)
        return True
    group.stop_others()
    return False


def failure_elsewhere() -> ModelcliError | None:
    """Return the error of another rank that may be why this one, rank 0, was asked to end."""
    return ranks.current().failure


@contextlib.contextmanager
def workers(jobs: int | None) -> Iterator[None]:
    """Start the workers of `--jobs` for the work of the block. The workers themselves start none.

    Raises RequestError for `--jobs` under torchrun.
    """
    group = ranks.current()
    if jobs is None or jobs == 1 or group.rank:
        yield
        return
    if group.size > 1:
        raise RequestError(f"--jobs {jobs}: torchrun has started {group.size} ranks already", "remove --jobs")
    from modelcli.ranks import starting

    with starting.workers(jobs, _words.get()) as started, ranks.entered(started):
        yield


def only_rank_0() -> None:
    """End the work of all ranks but 0 for a command that is not shared out."""
    ranks.current().rest_unless(False)

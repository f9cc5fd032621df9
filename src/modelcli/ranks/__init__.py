"""Several processes that carry out one command together: the ranks of torchrun, or the local workers of `--jobs`.

Each rank runs the same command and makes the same plan from the same files. `sharing` decides which rank writes or
reads what, and the ranks compare what they share out, so that they refuse to differ. Rank 0 prints, and replaces the
result when all ranks have finished. The ranks talk through sockets (`connected`); how they find each other is in
`starting` and, for torchrun, in `modelcli.live.rendezvous`. Nothing here imports torch, and a process that works by
itself imports `group` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from modelcli.ranks.group import ALONE, Group, GroupEndedError, RestingError

__all__ = ["ALONE", "Group", "GroupEndedError", "RestingError", "current", "entered"]

_current: Group = ALONE


def current() -> Group:
    """Return the group that this process belongs to: `ALONE` unless torchrun or `--jobs` started several."""
    return _current


@contextlib.contextmanager
def entered(group: Group) -> Iterator[None]:
    """Make this process a member of a group while the block runs."""
    global _current
    before, _current = _current, group
    try:
        yield
    finally:
        _current = before

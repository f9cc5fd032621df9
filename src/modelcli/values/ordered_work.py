"""Work on several threads, whose results come in the order of the tasks. NumPy lets other threads run meanwhile."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

#: More threads than this would wait for memory.
MOST_THREADS = 4


def threads() -> int:
    """How many threads work at a time: as many as this process may use processors, up to `MOST_THREADS`."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST_THREADS)
    return min(os.cpu_count() or 1, MOST_THREADS)


def in_order(work: Callable[[_Task], _Result], tasks: Iterable[_Task], *, ahead: int = 1) -> Iterator[_Result]:
    """The result of each task, in order, worked out on `threads()` threads; an error of a task is raised in its place.

    No more than `threads() + ahead` results exist at a time that the caller has not taken, which bounds the memory.
    With a single processor everything happens in the calling thread.
    """
    count = threads()
    if count == 1:
        yield from map(work, tasks)
        return
    from concurrent.futures import Future, ThreadPoolExecutor

    pool = ThreadPoolExecutor(count, thread_name_prefix="modelcli-values")
    waiting: deque[Future[_Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) == count + ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

"""Run tasks on several threads and yield the results in order. NumPy releases the GIL, so they run in parallel."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from modelcli import ranks

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

#: More threads would only wait for memory.
MAX_THREADS = 4


def threads() -> int:
    """Return the number of threads: as many as the process may use processors, up to `MAX_THREADS`.

    Several ranks on one machine share its processors.
    """
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(here // ranks.current().local_size, 1), MAX_THREADS)


def in_order(work: Callable[[_Task], _Result], tasks: Iterable[_Task], *, ahead: int = 1) -> Iterator[_Result]:
    """Yield the result of each task in order; an error of a task is raised at its turn.

    At most `threads() + ahead` results are waiting for the caller at a time, which bounds the memory. With a single
    processor everything happens in the calling thread.

    Args:
        work: the function to call for each task.
        tasks: the tasks.
        ahead: how many more tasks than threads may be started.
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

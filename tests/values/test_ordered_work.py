"""Work on several threads: results and errors come in the order of the tasks, with a limit on tasks ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from modelcli.values import ordered_work
from modelcli.values.ordered_work import in_order


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count: int = request.param
    monkeypatch.setattr(ordered_work, "threads", lambda: count)
    return count


def test_results_come_in_the_order_of_the_tasks(threads: int) -> None:
    def work(task: int) -> int:
        time.sleep(0.002 * (task % 3 == 0))
        return task * task

    assert list(in_order(work, range(50))) == [task * task for task in range(50)]
    assert list(in_order(work, [])) == []


def test_an_error_is_raised_in_the_order_of_the_tasks(threads: int) -> None:
    def work(task: int) -> int:
        if task == 5:
            raise ValueError("five")
        return task

    found = in_order(work, range(100))
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(found)
    assert list(found) == []


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_tasks_are_started_than_may_be_ahead(threads: int, ahead: int) -> None:
    """A slow consumer keeps few results in memory."""
    begun: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(30):
            begun.append(task)
            yield task

    for taken, _ in enumerate(in_order(lambda task: task, tasks(), ahead=ahead)):
        assert len(begun) <= taken + threads + ahead + 1


def test_stopping_early_leaves_no_thread_running(threads: int) -> None:
    before = threading.active_count()
    found = in_order(lambda task: task, range(1000))
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_the_number_of_threads() -> None:
    assert 1 <= ordered_work.threads() <= ordered_work.MAX_THREADS

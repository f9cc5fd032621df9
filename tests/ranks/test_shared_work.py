"""Ranks as threads of one process: what they share out, what they get, and what they refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from modelcli.errors import FileFormatError, ModelcliError
from modelcli.ranks import GroupEndedError, RestingError, starting
from modelcli.ranks.connected import Connected
from modelcli.ranks.shared_work import shared
from modelcli.ranks.starting import Place


def together(size: int, function: Callable[[Connected], Any]) -> list[Any]:
    """Return what a function returns on each rank, or the error that it raises there."""
    found: list[Any] = [None] * size

    def on(group: Connected) -> None:
        try:
            found[group.rank] = function(group)
        except (ModelcliError, GroupEndedError, RestingError) as error:
            found[group.rank] = error

    def other(rank: int, port: int) -> None:
        group = starting._connect(Place(rank, size, size), ["127.0.0.1"], port, "secret", 60)
        on(group)
        group.leave()

    with starting._listening("127.0.0.1") as server:
        port = server.getsockname()[1]
        threads = [threading.Thread(target=other, args=(rank, port)) for rank in range(1, size)]
        for thread in threads:
            thread.start()
        group = starting._gathered(server, Place(0, size, size), "secret", 60, {})
        on(group)
        group.finish()
        for thread in threads:
            thread.join()
    return found


_ITEMS = {f"layer{number}": number for number in range(7)}


def _shared(group: Connected, work: Callable[[Mapping[str, int]], Mapping[str, Any]], size: int = 10) -> dict[str, Any]:
    return shared(_ITEMS, list(_ITEMS), [size] * 7, work, group, pack=float.hex, unpack=float.fromhex)


def test_all_ranks_get_all_results_and_each_item_is_worked_on_once() -> None:
    done: list[str] = []

    def work(part: Mapping[str, int]) -> dict[str, float]:
        done.extend(part)
        return {name: value / 3 for name, value in part.items() if value != 4}

    found = together(3, lambda group: _shared(group, work))
    expected = {name: value / 3 for name, value in _ITEMS.items() if value != 4}
    assert found == [expected] * 3
    assert [list(each) for each in found] == [list(expected)] * 3
    assert sorted(done) == list(_ITEMS)


def test_the_error_of_one_rank_is_that_of_all_and_names_it() -> None:
    def work(part: Mapping[str, int]) -> dict[str, float]:
        if "layer3" in part:
            raise FileFormatError("x.pth is damaged", "copy it again")
        return {}

    found = together(3, lambda group: _shared(group, work))
    assert {type(error) for error in found} == {FileFormatError}
    (message,) = {error.message for error in found}
    assert message.startswith("rank 1 on ")
    assert message.endswith(": x.pth is damaged")


def test_ranks_with_other_tensors_refuse() -> None:
    found = together(2, lambda group: _shared(group, lambda _: {}, size=10 + group.rank))
    assert isinstance(found[0], GroupEndedError)
    assert "rank 1 on " in found[0].error.message
    assert "has another list of tensors than rank 0" in found[0].error.message


def test_ranks_that_do_different_things_refuse() -> None:
    found = together(2, lambda group: group.exchange("one" if group.rank else "other", b""))
    assert isinstance(found[0], GroupEndedError)


@pytest.mark.parametrize("size", [2, 5])
def test_large_and_empty_data_arrive(size: int) -> None:
    def say(group: Connected) -> tuple[list[bytes], bytes]:
        data = group.exchange("data", bytes([group.rank]) * (3_000_000 * (group.rank % 2)))
        return data, group.broadcast("more", b"" if group.rank else b"x" * 2_000_001)

    expected = [bytes([rank]) * (3_000_000 * (rank % 2)) for rank in range(size)]
    assert together(size, say) == [(expected, b"x" * 2_000_001)] * size

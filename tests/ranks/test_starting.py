"""How a process learns its rank, and that only ranks of the group are taken into it."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import threading
import time

import pytest

from modelcli.errors import RequestError
from modelcli.ranks import starting
from modelcli.ranks.messages import Connection, Kind, packed
from modelcli.ranks.starting import Place

_LAUNCHED = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, Place(3, 8, 1)),
        ({"LOCAL_WORLD_SIZE": "4"}, Place(3, 8, 4)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"MASTER_PORT": ""}, None),
        ({"MODELCLI_RANKS": "alone"}, None),
        ({"MODELCLI_WORKER": "2:3:4000:secret"}, Place(2, 3, 3, 4000, "secret")),
    ],
)
def test_the_place_of_a_process(
    changed: dict[str, str], expected: Place | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (_LAUNCHED | changed).items():
        monkeypatch.setenv(name, value)
    assert starting.place() == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "x", "RANK=x is no number"),
        ("RANK", "8", "RANK=8 is not below WORLD_SIZE=8"),
        ("MODELCLI_RANKS", "no", "MODELCLI_RANKS=no is not known"),
    ],
)
def test_a_place_that_cannot_be_read(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known, number in (_LAUNCHED | {name: value}).items():
        monkeypatch.setenv(known, number)
    with pytest.raises(RequestError, match=message):
        starting.place()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the variables of the parent")
@pytest.mark.parametrize(
    ("changed", "words", "is_told"),
    [
        ({}, (), True),
        ({}, ("-q",), False),
        ({"MODELCLI_RANKS": "alone"}, (), False),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (), False),
    ],
)
def test_a_process_below_a_shell_with_the_same_rank_says_that_it_works_by_itself(
    changed: dict[str, str], words: tuple[str, ...], is_told: bool
) -> None:
    """A wrapper between torchrun and modelcli looks like a training program that has started modelcli."""
    line = f"{shlex.join([sys.executable, '-m', 'modelcli', 'params', 'Linear(2,1)', *words])}; true"
    found = subprocess.run(
        ["sh", "-c", line], env=os.environ | _LAUNCHED | changed, capture_output=True, text=True, check=True
    )
    assert "weight" in found.stdout
    note = "note: this process works by itself: it has RANK=3 and WORLD_SIZE=8 of the process that started it; "
    assert (note + "MODELCLI_RANKS=launched makes it a rank" in found.stderr) == is_told
    assert ("MODELCLI_RANKS" in found.stderr) == is_told


def test_strangers_are_turned_away() -> None:
    """A port scanner, another user without the secret, and a rank that is there already are no ranks."""
    with starting._listening("127.0.0.1") as server:
        port = server.getsockname()[1]
        hello = {"rank": 1, "host": "h", "secret": "wrong", "version": "1"}
        deep = b"[" * 60_000
        first_messages = [
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x01" + (2**40).to_bytes(8, "big"),
            b"\x01" + len(deep).to_bytes(8, "big") + deep,
        ]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for stranger, message in zip(strangers, first_messages, strict=False):
            stranger.sendall(message)
            stranger.shutdown(socket.SHUT_WR)
        Connection(strangers[3]).send(Kind.HELLO, packed(hello))
        found: list[bytes] = []

        def other_rank() -> None:
            group = starting._connect(Place(1, 2, 2), ["127.0.0.1"], port, "right", 60)
            found.extend(group.exchange("numbers", b"one"))
            group.leave()

        thread = threading.Thread(target=other_rank)
        thread.start()
        group = starting._gathered(server, Place(0, 2, 2), "right", 60, {})
        assert group.exchange("numbers", b"zero") == [b"zero", b"one"]
        group.finish()
        thread.join()
        assert found == [b"zero", b"one"]
        for stranger in strangers:
            assert stranger.recv(1) == b""
            stranger.close()


def test_a_stranger_that_says_little_by_little_who_it_is_does_not_hold_the_ranks_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(starting, "_PATIENCE", 0.2)
    with starting._listening("127.0.0.1") as server:
        other = socket.create_connection(server.getsockname()[:2])
        one, _ = server.accept()
    message = b"\x01" + (1000).to_bytes(8, "big") + b" " * 1000

    def drip() -> None:
        with contextlib.suppress(OSError):
            for byte in message:
                other.sendall(bytes([byte]))
                time.sleep(0.05)

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    begin = time.monotonic()
    assert starting._welcomed(Connection(one), 2, "right", {}) is None
    assert time.monotonic() - begin < 10  # it would say it for 50 seconds
    thread.join()
    other.close()

"""The messages between ranks: a kind, a length and the bytes, over a socket that stays open."""

from __future__ import annotations

import contextlib
import enum
import json
import socket
import struct
import threading
import time
from typing import Any

#: The first message of a connection comes from a process that has not shown yet that it belongs here.
MOST_AT_FIRST = 1 << 16
_HEAD = struct.Struct("!BQ")
_STEP = 1 << 20


class Kind(enum.IntEnum):
    """What a message is about."""

    HELLO = 1  # a rank shows the token of the group, and says who it is
    WELCOME = 2  # rank 0 knows it
    BEAT = 3  # the sender works: a count that grows with its work, its bytes, and whether it waits for others
    DATA = 4  # a part of an exchange or a broadcast
    FAILED = 5  # the sender has failed, and why
    STOP = 6  # rank 0 has failed: stop working at once
    END = 7  # rank 0 has finished


class Connection:
    """A connection to another rank. Several threads may send, and one receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = sock
        self._lock = threading.Lock()
        self._deadline: float | None = None

    def send(self, kind: Kind, data: bytes = b"") -> None:
        """Send a message. Raises OSError if the other rank is gone."""
        with self._lock:
            self._send(kind, data)

    def send_unless_busy(self, kind: Kind, data: bytes = b"") -> None:
        """Send a message unless another thread is sending, which may be waiting for a rank that does not read."""
        if self._lock.acquire(blocking=False):
            try:
                self._send(kind, data)
            finally:
                self._lock.release()

    def _send(self, kind: Kind, data: bytes) -> None:
        self._socket.sendall(_HEAD.pack(kind, len(data)) + (data if len(data) < _STEP else b""))
        if len(data) >= _STEP:
            self._socket.sendall(data)

    def receive(self, most: int | None = None) -> tuple[Kind, bytes]:
        """Return the next message. Raises EOFError at the end, and for a message of more than `most` bytes."""
        kind, length = _HEAD.unpack(self._exactly(_HEAD.size))
        if most is not None and length > most:
            raise EOFError
        try:
            return Kind(kind), self._exactly(length)
        except ValueError:
            raise EOFError from None

    def _exactly(self, nbytes: int) -> bytes:
        pieces, left = [], nbytes
        while left:
            if self._deadline is not None:
                self._socket.settimeout(max(self._deadline - time.monotonic(), 0.001))
            piece = self._socket.recv(min(left, _STEP))
            if not piece:
                raise EOFError
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def patience(self, seconds: float | None) -> None:
        """Set how long from now on to wait for the other rank altogether; None waits as long as it takes."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Close the connection, also for a thread that waits for a message or sends one."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def packed(value: Any) -> bytes:
    """Return a value as JSON. Floats keep all bits; names may hold lone surrogates."""
    return json.dumps(value, separators=(",", ":")).encode()


def unpacked(data: bytes) -> Any:
    """Return the value that `packed` packed."""
    return json.loads(data)

"""The ranks of a command and what they tell each other. Every rank has a connection to rank 0.

While a rank works or waits, a thread of its own says so every few seconds and watches the others. If a rank dies, fails
or makes no progress for too long, rank 0 stops the others and ends the command with one message; if rank 0 itself is
gone, rank 1 says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from modelcli.errors import AnswerNoError, FileFormatError, ModelcliError, RequestError, SystemFailureError, UnsafeError
from modelcli.ranks.group import GroupEndedError, RestingError
from modelcli.ranks.messages import Connection, Kind, packed, unpacked

#: Seconds without progress after which a rank counts as hung, unless MODELCLI_RANK_TIMEOUT says otherwise.
TIMEOUT = 600.0
TIMEOUT_VARIABLE = "MODELCLI_RANK_TIMEOUT"
#: How many times longer work may take that moves no bytes, such as building a model: nothing tells how it gets on.
_LONGER = 6
#: Seconds between two signs of life.
_BEAT = 1.0
#: Seconds to wait for ranks that were asked to stop, and for rank 0 to end the command after a rank has failed.
_PATIENCE, _LONG_PATIENCE = 3.0, 60.0
#: The exit code of a rank that ends because rank 0 is gone, or because of a rank that died: the system failed.
_FAILED = SystemFailureError.exit_code


@dataclass
class _Pulse:
    """The signs of life of another rank: when the last one came, and when the rank last got on."""

    count: int = 0
    done: int = 0
    is_moving: bool = False
    heard: float = field(default_factory=time.monotonic)
    changed: float = field(default_factory=time.monotonic)

    def see(self, beat: Mapping[str, Any]) -> None:
        self.heard = time.monotonic()
        if beat["waits"] or (beat["count"], beat["moves"]) != (self.count, self.is_moving):
            self.changed = self.heard
        self.count, self.done, self.is_moving = beat["count"], beat["done"], beat["moves"]

    def rests(self, now: float, timeout: float) -> bool:
        """Whether the rank counts as hung: it is silent, or does not get on."""
        return now - self.heard > timeout or now - self.changed > timeout * (1 if self.is_moving else _LONGER)

    def restart(self) -> None:
        self.heard = self.changed = time.monotonic()


@dataclass
class Peer:
    """Another rank. `ended` says how its process ended, if that can be found out."""

    rank: int
    host: str
    connection: Connection
    ended: Callable[[], str | None] = lambda: None
    pulse: _Pulse = field(default_factory=_Pulse)
    received: deque[tuple[str, bytes]] = field(default_factory=deque)
    is_gone: bool = False
    has_failed: bool = False


class Connected:
    """One of several ranks, connected to rank 0; rank 0 is connected to all.

    Args:
        rank, size, local_size: as in `Group`.
        hosts: the host of each rank.
        peers: the ranks that it is connected to.
        timeout: seconds without progress after which a rank counts as hung.
    """

    def __init__(
        self, rank: int, size: int, local_size: int, hosts: Sequence[str], peers: Sequence[Peer], timeout: float
    ) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self._hosts, self._timeout = hosts, timeout
        self._peers = {peer.rank: peer for peer in peers}
        self._changed = threading.Condition()
        self._failure: ModelcliError | None = None
        self._cause: int | None = None
        self._count = self._done = 0
        self._waits = self._is_over = self._moves = False
        #: Whether this rank has told rank 0 an error of its own.
        self.is_failing = False
        #: Whether the command ends because of this rank, as far as rank 0 has not said that another one is the cause.
        self.is_cause = True
        self._end = threading.Event()
        self._undo: Callable[[], None] | None = None
        self._stderr = 2
        self._on_sigterm: Any = None
        self._threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in peers]
        self._threads.append(threading.Thread(target=self._watch, daemon=True))
        for thread in self._threads:
            thread.start()

    # --- what commands use -------------------------------------------------------------------------------------------

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def exchange(self, what: str, data: bytes) -> list[bytes]:
        self._done, self._moves = 0, False
        if self.rank:
            self._peers[0].connection.send(Kind.DATA, _tagged(what, data))
            return _split(self._next(self._peers[0], what))
        all_data = [data, *(self._next(self._peers[rank], what) for rank in range(1, self.size))]
        for peer in self._peers.values():
            peer.pulse.done = 0
        self._send_all(Kind.DATA, _tagged(what, _joined(all_data)))
        return all_data

    def broadcast(self, what: str, data: bytes = b"") -> bytes:
        if self.rank:
            return self._next(self._peers[0], what)
        self._send_all(Kind.DATA, _tagged(what, data))
        return data

    def moved(self, done: int, total: int) -> int:
        self._count += 1
        self._done, self._moves = done, done < total
        self._require_all()
        return done + sum(peer.pulse.done for peer in self._peers.values()) if not self.rank else done

    def rest_unless(self, condition: bool) -> None:
        if self.rank and not condition:
            raise RestingError

    def stop_others(self) -> None:
        if self.rank or self._is_over:
            return
        self._is_over = True
        # torchrun ends all ranks when one has failed. What remains to be done, this rank does before it ends.
        if threading.current_thread() is threading.main_thread():
            self._on_sigterm = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.connection.send_unless_busy(Kind.STOP)
        deadline = time.monotonic() + _PATIENCE
        with self._changed:
            while any(not (peer.is_gone or peer.has_failed) for peer in self._peers.values()):
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    break

    def require_same(self, digest: bytes, what: str) -> None:
        for rank, other in enumerate(digests := self.exchange(what, digest)):
            if other != digests[0]:
                raise GroupEndedError(self.differs(rank, f"has another {what} than rank 0"))

    def if_left_alone(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    # --- how a command ends ------------------------------------------------------------------------------------------

    @property
    def failure(self) -> ModelcliError | None:
        """The error of another rank, once rank 0 knows of one."""
        return self._failure

    def silence(self, *, errors: bool) -> None:
        """Let this rank print nothing from now on; with `errors`, not on standard error either."""
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            self._stderr = os.dup(2)
            os.dup2(nowhere.fileno(), 1)
            if errors:
                os.dup2(nowhere.fileno(), 2)

    def fail(self, error: ModelcliError) -> None:
        """Tell rank 0 why this rank has failed, and wait until the command has ended."""
        self.is_failing = True
        with contextlib.suppress(OSError):
            self._peers[0].connection.send(Kind.FAILED, packed(error_to_json(error)))
        self._end.wait(_LONG_PATIENCE)  # also where rank 0 is gone: another thread may be removing what was written

    def leave(self) -> None:
        """Wait until rank 0 has ended the command."""
        self._waits = True
        try:
            self._end.wait()
        except BaseException:
            # torchrun ends this rank because another one has died. If that was rank 0, a thread is about to say so.
            self._end.wait(_LONG_PATIENCE)
        self._peers[0].connection.close()

    def finish(self) -> None:
        """Tell all ranks that the command has ended."""
        self._is_over = True
        self._send_all(Kind.END, packed(self._cause))
        deadline = time.monotonic() + _PATIENCE
        with self._changed:
            while any(not peer.is_gone for peer in self._peers.values()) and time.monotonic() < deadline:
                self._changed.wait(0.1)
        for peer in self._peers.values():
            peer.connection.close()
        if self._on_sigterm is not None:
            signal.signal(signal.SIGTERM, self._on_sigterm)

    # --- threads -----------------------------------------------------------------------------------------------------

    def _listen(self, peer: Peer) -> None:
        """Receive the messages of another rank until it is gone."""
        try:
            while True:
                kind, data = peer.connection.receive()
                self._take(peer, kind, data)
        except (OSError, EOFError, ValueError):
            self._lose(peer)

    def _take(self, peer: Peer, kind: Kind, data: bytes) -> None:
        with self._changed:
            if kind == Kind.BEAT:
                peer.pulse.see(unpacked(data))
            elif kind == Kind.DATA:
                what, rest = _untagged(data)
                peer.pulse.restart()
                peer.received.append((what, rest))
            elif kind == Kind.FAILED:
                peer.has_failed = True
                self._note(peer, self.of_rank(peer.rank, error_from_json(unpacked(data))))
            elif kind == Kind.END:
                self._is_over, self.is_cause = True, unpacked(data) == self.rank
                self._end.set()
            elif kind == Kind.STOP and not self.is_failing:
                os._exit(0)  # what it was about to write is no longer wanted; rank 0 reports the failure
            self._changed.notify_all()

    def _lose(self, peer: Peer) -> None:
        """Note that another rank is gone. If it is rank 0, this process ends."""
        if self.rank:
            if not self._is_over:
                self._end_without(f"{self.name(0)} is gone")
            self._end.set()
        elif not self._is_over and not peer.has_failed:
            how = peer.ended() or "died"  # waits a moment for the process
            with self._changed:
                hint = "what it printed and the log of its machine may say why"
                self._note(peer, SystemFailureError(f"{self.name(peer.rank)} {how}", hint))
        with self._changed:
            peer.is_gone = True
            self._changed.notify_all()

    def _note(self, peer: Peer, error: ModelcliError) -> None:
        """Keep the first failure."""
        if self._failure is None:
            self._failure, self._cause = error, peer.rank

    def _end_without(self, why: str) -> NoReturn:
        """End this process because rank 0 is gone; rank 1 says so, and removes what was written."""
        if self.rank == 1:
            with contextlib.suppress(OSError):
                os.write(self._stderr, f"error: {why}\n".encode())
            if self._undo is not None:
                with contextlib.suppress(Exception):
                    self._undo()
        os._exit(_FAILED)

    def _watch(self) -> None:
        """Send signs of life, and find out who sends none."""
        step = min(_BEAT, self._timeout / 4)
        last = time.monotonic()
        while not self._is_over:
            time.sleep(step)
            now = time.monotonic()
            was_stopped, last = now - last > 4 * step + 1, now
            if self._waits:
                self._count += 1
            beat = packed({"count": self._count, "done": self._done, "waits": self._waits, "moves": self._moves})
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.connection.send_unless_busy(Kind.BEAT, beat)
                if was_stopped:  # this process, not the others
                    peer.pulse.restart()
                elif peer.pulse.rests(now, self._timeout) and not (peer.is_gone or self._is_over):
                    self._give_up(peer)

    def _give_up(self, peer: Peer) -> None:
        why = f"{self.name(peer.rank)} made no progress for {self._timeout:,.0f} s"
        if self.rank:
            self._end_without(why)
        with self._changed:
            self._note(peer, SystemFailureError(why, f"if it needs longer, set {TIMEOUT_VARIABLE} to more seconds"))
            self._changed.notify_all()
        peer.connection.close()  # also for a thread that is sending to it

    # --- messages ----------------------------------------------------------------------------------------------------

    def _next(self, peer: Peer, what: str) -> bytes:
        """Return the next data from another rank. Raises GroupEndedError on rank 0 if a rank has failed."""
        self._waits = True
        try:
            with self._changed:
                while not peer.received:
                    self._require_all()
                    if self._end.is_set():  # the command has ended without what this rank waits for
                        raise RestingError
                    self._changed.wait(0.5)
                found, data = peer.received.popleft()
        finally:
            self._waits = False
            self._count += 1
        if found != what:
            raise GroupEndedError(self.differs(peer.rank, f"does {found!r} where {self.name(self.rank)} does {what!r}"))
        return data

    def _require_all(self) -> None:
        if self._failure is not None and not self.rank:
            raise GroupEndedError(self._failure)

    def _send_all(self, kind: Kind, data: bytes = b"") -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the thread that listens to it finds out why
                peer.connection.send(kind, data)

    def of_rank(self, rank: int, error: ModelcliError) -> ModelcliError:
        """Return the error of a rank, with the name of another rank than 0 in its message."""
        if rank:
            error.message = f"{self.name(rank)}: {error.message}"
        return error

    def differs(self, rank: int, how: str) -> SystemFailureError:
        """Return the error for a rank that does not do what this one does."""
        return SystemFailureError(
            f"{self.name(rank)} {how}", "all ranks need the same files, the same modelcli and the same libraries"
        )


def timeout_from_environment() -> float:
    """Return the seconds without progress after which a rank counts as hung. Raises RequestError for other texts."""
    text = os.environ.get(TIMEOUT_VARIABLE)
    if not text:
        return TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RequestError(f"{TIMEOUT_VARIABLE}={text} is no number of seconds", f"{TIMEOUT_VARIABLE}=600, for example")
    return seconds


_ERRORS: Sequence[type[ModelcliError]] = (AnswerNoError, UnsafeError, FileFormatError, SystemFailureError)


def error_to_json(error: ModelcliError) -> dict[str, Any]:
    """Return an error in a form in which it can be sent to another rank."""
    return {"message": error.message, "hint": error.hint, "kind": error.kind, "exit_code": error.exit_code}


def error_from_json(found: Mapping[str, Any]) -> ModelcliError:
    """Return the error of another rank, of the class with its exit code."""
    made = next((kind for kind in _ERRORS if kind.exit_code == found["exit_code"]), RequestError)
    error = made(found["message"], found["hint"])
    error.kind, error.exit_code = found["kind"], found["exit_code"]
    return error


def _tagged(what: str, data: bytes) -> bytes:
    return b"%b\0%b" % (what.encode(), data)


def _untagged(data: bytes) -> tuple[str, bytes]:
    what, _, rest = data.partition(b"\0")
    return what.decode(), rest


def _joined(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def _split(data: bytes) -> list[bytes]:
    parts, start = [], 0
    while start < len(data):
        length = int.from_bytes(data[start : start + 8], "big")
        parts.append(data[start + 8 : start + 8 + length])
        start += 8 + length
    return parts

"""How a process learns that it is one of several ranks, and how the ranks find each other.

Rank 0 listens, and the others connect to it and show a secret. Under torchrun the address and the secret go through
torch's store (`modelcli.live.rendezvous`); the workers of `--jobs` get both from the process that starts them.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcli import _version
from modelcli.errors import RequestError, SystemFailureError
from modelcli.ranks.connected import Connected, Peer, timeout_from_environment
from modelcli.ranks.messages import MOST_AT_FIRST, Connection, Kind, packed, unpacked

#: `alone` makes a process that torchrun started, or one below it, work by itself; `launched` makes it a rank.
RANKS_VARIABLE = "MODELCLI_RANKS"
#: Where a worker of `--jobs` finds rank 0: its rank, the number of ranks, the port, and the secret.
WORKER_VARIABLE = "MODELCLI_WORKER"
#: What torchrun, or another launcher that follows it, tells a process.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH = (*_LAUNCHED, "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
_LOCALHOST = "127.0.0.1"
#: Seconds to wait for a process that has connected to say who it is.
_PATIENCE = 5.0
#: Seconds that the processes have at least to start, which means to import modelcli, and torch below torchrun.
TO_START = 120.0

#: Gives the other ranks what rank 0 has, and returns it on all ranks.
Share = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Place:
    """The place of a process among the ranks.

    Attributes:
        rank, size, local_size: as in `modelcli.ranks.Group`.
        port: the port of rank 0 on this machine; None if the ranks have to find out.
        secret: what proves to rank 0 that a process belongs to the group.
    """

    rank: int
    size: int
    local_size: int
    port: int | None = None
    secret: str = ""


def place(tell: Callable[[str], None] = lambda _note: None) -> Place | None:
    """Return the place of this process among the ranks; None if it works by itself.

    A program that torchrun has started may start modelcli for itself. Such a process inherits the variables of its
    parent, and is no rank: on Linux it is known by that.

    Args:
        tell: called with a note if the process is taken for one that has inherited its variables. A shell between the
            launcher and modelcli looks the same, and each rank would then do the whole work.

    Raises RequestError for variables that cannot be read.
    """
    environment = os.environ
    if given := environment.pop(WORKER_VARIABLE, None):
        *of_worker, secret = given.split(":")
        rank, size, port = map(int, of_worker)
        return Place(rank, size, size, port, secret)
    wanted = environment.get(RANKS_VARIABLE, "")
    if wanted not in ("", "alone", "launched"):
        raise RequestError(f"{RANKS_VARIABLE}={wanted} is not known", f"{RANKS_VARIABLE}=alone or launched")
    if wanted == "alone" or not all(environment.get(name) for name in _LAUNCHED):
        return None
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        text = environment.get(name, "1")
        if not text.isdecimal():
            raise RequestError(f"{name}={text} is no number", f"{RANKS_VARIABLE}=alone ignores it")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if size < 2:
        return None
    if wanted != "launched" and _is_inherited():
        tell(
            f"this process works by itself: it has RANK={rank} and WORLD_SIZE={size} of the process that started it; "
            f"{RANKS_VARIABLE}=launched makes it a rank, and {RANKS_VARIABLE}=alone is for this work"
        )
        return None
    if rank >= size:
        raise RequestError(f"RANK={rank} is not below WORLD_SIZE={size}", f"{RANKS_VARIABLE}=alone ignores them")
    return Place(rank, size, min(max(numbers["LOCAL_WORLD_SIZE"], 1), size))


def _is_inherited() -> bool:
    """Whether the parent of this process was started as the same rank, as far as the system tells."""
    try:
        text = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    entries = (entry.partition("=") for entry in os.fsdecode(text).split("\0"))
    parent = {name: value for name, _, value in entries}
    return all(parent.get(name) == os.environ.get(name) for name in _LAUNCH)


def joined(own: Place, share: Share | None = None) -> Connected:
    """Return the group of this process, once all ranks are there.

    Args:
        own: the place of the process.
        share: how rank 0 tells the others where it is; not needed for a worker of `--jobs`.

    Raises SystemFailureError if a rank does not come.
    """
    timeout = timeout_from_environment()
    if own.port is not None:
        return _connect(own, [_LOCALHOST], own.port, own.secret, timeout)
    assert share is not None
    if own.rank:
        told = unpacked(share(b""))
        return _connect(own, told["hosts"], told["port"], told["secret"], timeout)
    secret, is_local = secrets.token_hex(16), own.local_size == own.size
    with _listening(_LOCALHOST if is_local else "") as server:
        hosts = [_LOCALHOST] if is_local else _own_addresses()
        share(packed({"hosts": hosts, "port": server.getsockname()[1], "secret": secret}))
        return _gathered(server, own, secret, timeout, {})


def _own_addresses() -> list[str]:
    """Return the names and addresses under which the machines of other ranks may reach this one."""
    found = [socket.gethostname(), socket.getfqdn()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "192.0.2.1"), 9))  # sends nothing
        found.insert(0, probe.getsockname()[0])
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def _listening(host: str) -> Iterator[socket.socket]:
    try:
        if not host and socket.has_dualstack_ipv6():
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            server = socket.create_server((host, 0), backlog=1024)
    except OSError as error:
        raise SystemFailureError(f"cannot listen for the other ranks: {error.strerror or error}") from None
    with server:
        yield server


def _gathered(
    server: socket.socket, own: Place, secret: str, timeout: float, processes: Mapping[int, subprocess.Popen[bytes]]
) -> Connected:
    """Wait for all other ranks, and return the group of rank 0. `processes` are those that it has started."""
    hosts = {0: socket.gethostname()}
    found: dict[int, Connection] = {}
    patience = max(timeout, TO_START)
    deadline = time.monotonic() + patience
    server.settimeout(0.2)
    while len(found) < own.size - 1:
        missing = [rank for rank in range(1, own.size) if rank not in found]
        for rank in missing:
            if rank in processes and processes[rank].poll() is not None:
                raise SystemFailureError(f"worker {rank} ended before it began: {_how(processes[rank])}")
        if time.monotonic() > deadline:
            names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise SystemFailureError(
                f"{len(missing)} of {own.size} ranks did not come within {patience:,.0f} s: {names}",
                f"to work in one process below torchrun, set {RANKS_VARIABLE}=alone",
            )
        try:
            sock, _ = server.accept()
        except TimeoutError:
            continue
        try:
            connection = Connection(sock)
        except OSError:  # it is gone again
            sock.close()
            continue
        if (came := _welcomed(connection, own.size, secret, found)) is not None:
            rank, host, connection = came
            hosts[rank], found[rank] = host, connection
    names_of_hosts = [hosts[rank] for rank in range(own.size)]
    for connection in found.values():
        connection.send(Kind.WELCOME, packed(names_of_hosts))
    peers = [
        Peer(rank, hosts[rank], connection, _ending(processes.get(rank))) for rank, connection in sorted(found.items())
    ]
    return Connected(0, own.size, own.local_size, names_of_hosts, peers, timeout)


def _welcomed(
    connection: Connection, size: int, secret: str, known: Mapping[int, Any]
) -> tuple[int, str, Connection] | None:
    """Return the rank, the host and the connection of a process that belongs to the group; None for any other."""
    connection.patience(_PATIENCE)
    try:
        kind, data = connection.receive(MOST_AT_FIRST)
        hello = unpacked(data)
        rank, host, given, version = (hello[key] for key in ("rank", "host", "secret", "version"))
        if kind != Kind.HELLO or not hmac.compare_digest(str(given).encode(), secret.encode()):
            raise ValueError
        if not (isinstance(rank, int) and 0 < rank < size and rank not in known):
            raise ValueError
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError):
        connection.close()
        return None
    if version != _version.__version__:
        connection.close()
        raise SystemFailureError(
            f"rank {rank} on {host} runs modelcli {version}, and rank 0 {_version.__version__}",
            "install one version on all machines",
        )
    connection.patience(None)
    return rank, str(host), connection


def _connect(own: Place, hosts: Sequence[str], port: int, secret: str, timeout: float) -> Connected:
    """Connect to rank 0, and return the group of another rank."""
    patience = max(timeout, TO_START)
    deadline, problem = time.monotonic() + patience, "no address"
    while time.monotonic() < deadline:
        for host in hosts:
            try:
                connection = Connection(socket.create_connection((host, port), _PATIENCE))
            except OSError as error:
                problem = f"{host}:{port}: {error.strerror or error}"
                continue
            hello = {"rank": own.rank, "host": socket.gethostname(), "secret": secret, "version": _version.__version__}
            try:
                connection.send(Kind.HELLO, packed(hello))
                connection.patience(patience)
                kind, data = connection.receive()
            except (OSError, EOFError):
                raise SystemFailureError(f"rank {own.rank} was not taken into the group of rank 0") from None
            if kind == Kind.WELCOME:
                connection.patience(None)
                names = unpacked(data)
                return Connected(own.rank, own.size, own.local_size, names, [Peer(0, names[0], connection)], timeout)
        time.sleep(0.2)
    raise SystemFailureError(f"rank {own.rank} on {socket.gethostname()} cannot reach rank 0: {problem}")


# --- the workers of --jobs -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workers(count: int, words: Sequence[str]) -> Iterator[Connected]:
    """Start workers that carry out the same command line, and yield the group with this process as rank 0.

    Args:
        count: the number of processes, this one included: two or more.
        words: the command line.

    Raises SystemFailureError if a worker cannot be started.
    """
    timeout, secret = timeout_from_environment(), secrets.token_hex(16)
    processes: dict[int, subprocess.Popen[bytes]] = {}
    try:
        with _listening(_LOCALHOST) as server:
            for rank in range(1, count):
                processes[rank] = _started(f"{rank}:{count}:{server.getsockname()[1]}:{secret}", words)
            group = _gathered(server, Place(0, count, count), secret, timeout, processes)
        try:
            yield group
        except BaseException:
            group.stop_others()
            raise
        finally:
            group.finish()
    finally:
        for process in processes.values():
            _end(process)


def _started(place_of_worker: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a worker in a process group of its own: Ctrl-C is for this process alone, which ends the workers."""
    try:
        return subprocess.Popen(
            [sys.executable, *_without_current_folder(), "-m", "modelcli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, WORKER_VARIABLE: place_of_worker},
            process_group=None if os.name == "nt" else 0,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows has it
        )
    except OSError as error:
        raise SystemFailureError(f"cannot start a worker: {error.strerror or error}") from None


def _without_current_folder() -> Sequence[str]:
    """Return the options that keep Python from importing what lies in the current folder: a model that was downloaded.

    Where modelcli itself is imported from the current folder, there are none.
    """
    package = Path(_version.__file__).resolve().parent
    return () if package.parent == Path.cwd() else ("-P",)


def _ending(process: subprocess.Popen[bytes] | None) -> Callable[[], str | None]:
    """Return a function that says how a process ended; it waits a moment for that."""

    def how() -> str | None:
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        return f"died: {_how(process)}" if process.returncode else None

    return how


def _how(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is not None and code < 0:
        import signal

        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a worker that has not ended by itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
        return
    process.kill()
    process.wait()

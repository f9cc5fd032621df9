"""What a checkpoint of 671 billion parameters takes on 1, 8 and 64 nodes: computed and simulated, without its bytes.

    python -m tests.benchmarks.simulated_ranks

Prints the tables of docs/large-checkpoints.md:

- what each node reads, writes and how long that takes, from modelcli's own sharing of 163 shards;
- the plan of one rank of 64 for 100,000 tensors, made by the real command on sparse files, where each call to the file
  system takes 5 ms longer (`LATENCY`), but where a client of NFS or Lustre remembers the answer;
- what 64 ranks tell each other, over sockets of this machine;
- what the file system does while rank 0 puts the new folder in the place of the old one.

Each bound is printed with whether it is met; where one is missed, the exit code is 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_reading import sparse_safetensors

from modelcli.ranks import starting
from modelcli.ranks.connected import Connected
from modelcli.ranks.messages import Connection, Kind, packed
from modelcli.ranks.sharing import evenly

#: The parameters of the checkpoint, in bfloat16, and its shards.
PARAMETERS, SHARDS = 671 * 10**9, 163
NBYTES = 2 * PARAMETERS
TENSORS = int(os.environ.get("TENSORS", "100000"))
RANKS = 64
#: Seconds that each call to the simulated file system takes longer.
LATENCY = float(os.environ.get("LATENCY", "0.005"))
MOST_SECONDS, MOST_MEGABYTES = 10, 1000

_EDIT = ("rename", "model.**", "net.**", "-m", "in/", "-o", "out/", "--max-shard-size", "8.234GB", "--force", "-q")


def nodes() -> None:
    """What the node with the most shards reads and writes, and the time of that."""
    sizes = [NBYTES // SHARDS] * SHARDS
    print("| nodes | shards a node, at most | it reads | it writes | at 2 GB/s | at 20 GB/s | the file system gives |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in (1, 8, RANKS):
        ranks = evenly(sizes, count)
        loads = [sum(size for size, rank in zip(sizes, ranks, strict=True) if rank == node) for node in range(count)]
        most = max(loads)
        times = [_time(2 * most / rate) for rate in (2e9, 20e9)]
        rates = f"{2 * count} to {20 * count} GB/s"
        shards = max(Counter(ranks).values())
        print(
            f"| {count} | {shards} | {most / 1e9:,.0f} GB | {most / 1e9:,.0f} GB | {times[0]} | {times[1]} | {rates} |"
        )
    print()


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 120 else f"{seconds:,.0f} s"


# --- the file system -------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> None:
    """Write `in/`: sparse shards with right headers, and their index."""
    folder.mkdir()
    each, more = divmod(TENSORS, SHARDS)
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        name, tensors = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors", each + (number < more)
        prefix = f"model.part{number}.layers"
        sparse_safetensors(folder / name, NBYTES // SHARDS, tensors, prefix=prefix)
        weight_map |= {f"{prefix}.{tensor}.weight": name for tensor in range(tensors)}
    index = {"metadata": {"total_size": NBYTES}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class FileSystem:
    """The file system of this process: each call takes longer and is counted.

    As a client of NFS or Lustre does for some seconds, it remembers what it knows of a path: asking again is no call.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._known: set[str] = set()

    def slow_down(self, *names: str) -> None:
        for name in names:
            self._wrap(os, name)
        import builtins
        import io

        self._wrap(io, "open")
        builtins.open = io.open

    def _wrap(self, module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **more: Any) -> Any:
            path = args[0] if args else None
            if name in ("stat", "lstat"):
                where = path if isinstance(path, int) or "dir_fd" in more else os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
                if str(where) in self._known or isinstance(path, int):
                    return original(*args, **more)
                self._known.add(str(where))
            self.calls[name] += 1
            time.sleep(LATENCY)
            return original(*args, **more)

        setattr(module, name, call)


_CALLS = (
    "open",
    "stat",
    "lstat",
    "listdir",
    "scandir",
    "mkdir",
    "rmdir",
    "unlink",
    "rename",
    "replace",
    "fsync",
    "link",
)


class _PlannedError(BaseException):
    """The plan is made: the simulation of a rank ends here."""


class _OneOfMany:
    """The group of one rank of 64 that plans alone: it ends when the plans are compared."""

    rank, size, local_size, failure = 5, RANKS, 1, None

    def rest_unless(self, condition: bool) -> None:
        assert condition

    def require_same(self, digest: bytes, what: str) -> None:
        raise _PlannedError


def plan_of_one_rank() -> None:
    """In a process of its own: carry the command out up to the comparison of plans; print what it took."""
    import resource

    from modelcli import ranks
    from modelcli.cli import main

    system = FileSystem()
    start = time.process_time()
    system.slow_down(*_CALLS)
    with contextlib.suppress(_PlannedError), ranks.entered(_OneOfMany()):  # type: ignore[arg-type]
        raise SystemExit(f"the command ended with {main(_EDIT)}")
    worked = time.process_time() - start
    calls = sum(system.calls.values())
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"worked": worked, "calls": calls, "waited": calls * LATENCY, "megabytes": megabytes}))


def swap() -> None:
    """In a process of its own: write sparse shards over an older folder; print the calls from the last byte on."""
    import shutil

    from modelcli import checkpoints, writing
    from modelcli.cli import main
    from modelcli.files import open_folder

    space = shutil.disk_usage("/")
    shutil.disk_usage = lambda _path: space._replace(free=2 * NBYTES)  # type: ignore[assignment]
    assert main(_EDIT) == 0
    system, began, exchanged = FileSystem(), [0.0], [0.0]
    format_ = checkpoints.formats.named(writing.format_of("out/"))
    verify = format_.verify_folder
    exchange = open_folder.OpenFolder.exchange

    def verify_slowly(*args: Any) -> None:
        began[0] = time.perf_counter()
        system.slow_down(*_CALLS)
        verify(*args)

    def exchange_slowly(self: open_folder.OpenFolder, one: str, other: str) -> bool:
        system.calls["exchange of two names"] += 1
        time.sleep(LATENCY)
        done = exchange(self, one, other)
        exchanged[0] = time.perf_counter()
        return done

    object.__setattr__(format_, "verify_folder", verify_slowly)
    open_folder.OpenFolder.exchange = exchange_slowly  # type: ignore[method-assign]
    assert main(_EDIT) == 0
    end = time.perf_counter()
    print(
        json.dumps(
            {"calls": system.calls, "until": exchanged[0] - began[0], "after": end - exchanged[0]},
        )
    )


def _in_process(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.simulated_ranks", name, os.getcwd()],  # noqa: PTH109
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- what the ranks tell each other ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted_bytes() -> Iterator[list[int]]:
    """Count the bytes that all ranks send."""
    sent, original = [0], Connection._send

    def send(self: Connection, kind: Kind, data: bytes) -> None:
        sent[0] += len(data) + 9
        original(self, kind, data)

    Connection._send = send  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        Connection._send = original  # type: ignore[method-assign]


def talk(count: int) -> tuple[float, int, float, int]:
    """Connect `count` ranks, each a thread of this process, and let them say what they say.

    Returns the seconds and bytes of writing a folder, and those of gathering the statistics of all tensors.
    """
    digest = hashlib.sha256(b"plan").digest()
    folder = packed({"folder": f"/checkpoints/.out.{'0' * 8}.modelcli-tmp", "inode": 2**40})
    row = [7, -0.123456789012345, 1.2345678901234567, 1e-9, 1e-20, 12345.678901234567, 3, 0, 0]
    statistics = packed([[number, row] for number in range(TENSORS // count)])
    moments: list[float] = []

    def say(group: Connected) -> None:
        group.require_same(digest, "plan")
        group.broadcast("folder", folder)
        group.exchange("written", b"0")
        group.exchange("values", b"[]")
        group.broadcast("replacing")
        group.exchange("unchanged", b"")
        if not group.rank:
            moments.append(time.perf_counter())
            moments.append(sent[0])
        group.exchange("statistics", statistics)

    def leaf(rank: int, port: int) -> None:
        group = starting._connect(starting.Place(rank, count, count), ["127.0.0.1"], port, "secret", 600)
        say(group)
        group.leave()

    with _counted_bytes() as sent, starting._listening("127.0.0.1") as server:
        port, start = server.getsockname()[1], time.perf_counter()
        threads = [threading.Thread(target=leaf, args=(rank, port)) for rank in range(1, count)]
        for thread in threads:
            thread.start()
        group = starting._gathered(server, starting.Place(0, count, count), "secret", 600, {})
        say(group)
        end, total = time.perf_counter(), sent[0]
        group.finish()
        for thread in threads:
            thread.join()
    return moments[0] - start, int(moments[1]), end - moments[0], total - int(moments[1])


# --- the tables ------------------------------------------------------------------------------------------------------


def main() -> int:
    nodes()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_checkpoint(Path("in"))
        plan, swapped = _in_process("plan_of_one_rank"), _in_process("swap")
    seconds, nbytes, more_seconds, more_bytes = talk(RANKS)
    planned = plan["worked"] + plan["waited"]
    is_met = planned + seconds <= MOST_SECONDS and plan["megabytes"] <= MOST_MEGABYTES
    calls = f"{plan['calls']} calls to a file system that takes {LATENCY * 1000:.0f} ms for each"
    print(f"| {TENSORS:,} tensors in {SHARDS} shards, {RANKS} ranks | |")
    print("| --- | ---: |")
    print(f"| the plan of each rank | {planned:.1f} s |")
    print(f"| of which its processor works | {plan['worked']:.1f} s |")
    print(f"| and it waits for {calls} | {plan['waited']:.1f} s |")
    print(f"| memory of each rank | {plan['megabytes']:.0f} MB |")
    print(f"| finding each other, and all that {RANKS} ranks say to write a folder | {seconds:.1f} s, "
          f"{nbytes / 1e6:.1f} MB |")  # fmt: skip
    print(f"| to give all ranks the statistics of all tensors | {more_seconds:.1f} s, {more_bytes / 1e6:.0f} MB |")
    bound = f"at most {MOST_SECONDS} s and {MOST_MEGABYTES} MB"
    print(f"\nplan and talk: {bound}: {'met' if is_met else 'MISSED'}\n")
    print("| from the last byte to the end, on rank 0 | calls |")
    print("| --- | ---: |")
    for name, number in sorted(swapped["calls"].items(), key=lambda item: -item[1]):
        print(f"| {name} | {number} |")
    print(f"| until the new folder is in its place, at {LATENCY * 1000:.0f} ms a call | {swapped['until']:.1f} s |")
    print(f"| after that: the old shards are removed | {swapped['after']:.1f} s |")
    return 0 if is_met else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.chdir(sys.argv[2])
        steps: dict[str, Callable[[], None]] = {"plan_of_one_rank": plan_of_one_rank, "swap": swap}
        steps[sys.argv[1]]()
        sys.exit(0)
    sys.exit(main())

"""What was allocated and freed in one step, in order, and what follows from that: the peak and what it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

Kind = Literal["params", "buffers", "gradients", "optimizer", "activations", "temporary"]

#: The kinds of memory, in the order of tables and documents.
KINDS: tuple[Kind, ...] = ("params", "buffers", "gradients", "optimizer", "activations", "temporary")

#: The parts of a step. `setup` is before it; `first_update` creates the optimizer's state and is no part of it.
Phase = Literal["setup", "forward", "backward", "first_update", "update"]

_ALLOCATE, _FREE, _BECOME, _WORKSPACE = range(4)


class Allocator(Protocol):
    """Hands out memory and counts it."""

    allocated: int
    reserved: int

    def allocate(self, nbytes: int) -> Any: ...

    def release(self, block: Any) -> None: ...

    def rounded(self, nbytes: int) -> int: ...


class PlainAllocator:
    """An allocator that hands out exactly the bytes that are asked for, as torch's allocator of the CPU does."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0

    def allocate(self, nbytes: int) -> int:
        self.allocated += nbytes
        self.reserved = max(self.reserved, self.allocated)
        return nbytes

    def release(self, block: int) -> None:
        self.allocated -= block

    def rounded(self, nbytes: int) -> int:
        return nbytes


@dataclass(frozen=True, slots=True)
class _Event:
    """What happened to one block. `path` is the module that was running; None if none was."""

    what: int
    block: int
    path: str | None
    phase: Phase
    kind: Kind
    nbytes: int


@dataclass
class MemoryLog:
    """Everything that was allocated, became something else, or was freed, in order.

    Attributes:
        phase: the phase that new events belong to.
        events: the events.
        multiplies: the phases in which matrices were multiplied, for which cuBLAS needs a workspace.
    """

    phase: Phase = "setup"
    events: list[_Event] = field(default_factory=list)
    multiplies: set[Phase] = field(default_factory=set)
    _blocks: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)

    def allocate(self, nbytes: int, kind: Kind, path: str | None = None) -> int:
        """Record that a block was allocated, and return its number."""
        self._blocks += 1
        self._sizes[self._blocks] = nbytes
        self.events.append(_Event(_ALLOCATE, self._blocks, path, self.phase, kind, nbytes))
        return self._blocks

    def free(self, block: int) -> None:
        """Record that a block was freed."""
        self.events.append(_Event(_FREE, block, None, self.phase, "temporary", self._sizes.pop(block)))

    def become(self, block: int, kind: Kind) -> None:
        """Record that a block is of another kind from now on, such as a gradient that a parameter holds."""
        self.events.append(_Event(_BECOME, block, None, self.phase, kind, self._sizes[block]))

    def need_workspace(self, nbytes: int, path: str | None) -> None:
        """Record that an operator may have needed a workspace of this size while it ran, which nobody can see."""
        self.events.append(_Event(_WORKSPACE, 0, path, self.phase, "temporary", nbytes))

    def steady(self) -> list[_Event]:
        """Return the events of a later step: the optimizer's state exists before it begins."""
        first = [event for event in self.events if event.phase == "first_update"]
        made = {event.block for event in first if event.what == _ALLOCATE}
        state = {event.block for event in first if event.what == _BECOME and event.kind == "optimizer"}
        setup = [event for event in self.events if event.phase == "setup"]
        setup += [replace(event, phase="setup") for event in first if event.block in state]
        # What the step had made, and what was freed in the first update, was there until the second one.
        freed = [replace(event, phase="update") for event in first if event.block not in made]
        step = [event for event in self.events if event.phase in ("forward", "backward")]
        update = [event for event in self.events if event.phase == "update" and event.block not in made - state]
        return [*setup, *step, *freed, *update]


@dataclass(frozen=True)
class Moment:
    """A moment in a step, and what was allocated then.

    Attributes:
        allocated: the bytes of all blocks, as the allocator counts them.
        parts: the bytes of each kind; they sum up to `allocated`.
        path: the module that was running; None if none was.
        phase: what was going on.
    """

    allocated: int
    parts: Mapping[Kind, int]
    path: str | None
    phase: Phase


@dataclass(frozen=True)
class ModuleMemory:
    """What one module, apart from the modules inside it, has to do with the memory.

    Attributes:
        path: the path of the module.
        kept: the bytes that it allocated and that were still there when the forward pass had ended.
        peak: the most bytes that were allocated in total while it ran, forwards or backwards.
    """

    path: str
    kept: int
    peak: int


@dataclass(frozen=True)
class Usage:
    """The memory of one step.

    Attributes:
        peak: the moment at which most was allocated.
        whole: the bytes of each kind when there was most of it, of blocks that are no larger than they have to be.
            `temporary` is that of the peak.
        reserved: the bytes that the allocator had reserved at the end, which it keeps.
        modules: what each module that ran has to do with it, in the order in which they began.
    """

    peak: Moment
    whole: Mapping[Kind, int]
    reserved: int
    modules: tuple[ModuleMemory, ...]


def replay(
    events: Sequence[_Event], allocator: Allocator, *, held: Sequence[int] = (), workspaces: bool = False
) -> Usage:
    """Hand out and take back the blocks of a step, and return where that leads to.

    Args:
        events: what happened, from `MemoryLog.steady`.
        allocator: a new allocator, which decides how large blocks are.
        held: the sizes of blocks that exist all the time, such as the workspaces of cuBLAS.
        workspaces: whether operators get the workspaces that they may have needed.

    Returns:
        The peak of everything after the setup, and what it consists of.
    """
    for nbytes in held:
        allocator.allocate(nbytes)
    extra = allocator.allocated
    blocks: dict[int, Any] = {}
    sizes: dict[int, int] = {}
    most, at = -1, 0
    peaks: dict[str, int] = {}
    for index, event in enumerate(events):
        if event.what == _FREE:
            allocator.release(blocks.pop(event.block))
            continue
        if event.what == _BECOME or (event.what == _WORKSPACE and not workspaces):
            continue
        before = allocator.allocated
        block = allocator.allocate(event.nbytes)
        if event.what == _ALLOCATE:
            blocks[event.block], sizes[event.block] = block, allocator.allocated - before
        if event.phase != "setup":
            now = allocator.allocated
            if now > most:
                most, at = now, index
            if event.path is not None:
                peaks[event.path] = max(peaks.get(event.path, 0), now)
        if event.what == _WORKSPACE:
            allocator.release(block)
    kept = _kept(events)
    parts = _parts_at(events, at, sizes, kept)
    parts["temporary"] += extra
    if workspaces and events and events[at].what == _WORKSPACE:
        parts["temporary"] += most - sum(parts.values())
    if most < 0:
        most = sum(parts.values())
    here = events[at] if events else None
    peak = Moment(most, parts, here.path if here else None, here.phase if here else "forward")
    least = {event.block: allocator.rounded(event.nbytes) for event in events if event.what == _ALLOCATE}
    own: dict[str, int] = {}
    for event in events:
        if event.what == _ALLOCATE and event.path is not None and event.phase == "forward":
            own[event.path] = own.get(event.path, 0) + (least[event.block] if event.block in kept else 0)
    modules = tuple(ModuleMemory(path, own.get(path, 0), nbytes) for path, nbytes in peaks.items())
    return Usage(peak, _whole(events, least, kept, parts), allocator.reserved, modules)


def _alive_after(events: Sequence[_Event]) -> dict[int, Kind]:
    """Return the kinds of all blocks that exist after these events."""
    alive: dict[int, Kind] = {}
    for event in events:
        if event.what == _FREE:
            del alive[event.block]
        elif event.what != _WORKSPACE:
            alive[event.block] = event.kind
    return alive


def _kept(events: Sequence[_Event]) -> frozenset[int]:
    """Return the blocks of the forward pass that existed when it had ended, and the inputs."""
    ended = next((index for index, event in enumerate(events) if event.phase in ("backward", "update")), len(events))
    alive = _alive_after(events[:ended])
    return frozenset(block for block, kind in alive.items() if kind in ("activations", "temporary"))


def _parts_at(events: Sequence[_Event], at: int, sizes: Mapping[int, int], kept: frozenset[int]) -> dict[Kind, int]:
    """Return the bytes of each kind after the event `at`."""
    parts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for block, kind in _alive_after(events[: at + 1]).items():
        if kind in ("activations", "temporary"):
            kind = "activations" if block in kept else "temporary"
        parts[kind] += sizes[block]
    return parts


def _whole(
    events: Sequence[_Event], sizes: Mapping[int, int], kept: frozenset[int], parts: Mapping[Kind, int]
) -> dict[Kind, int]:
    """Return the bytes of each kind when there was most of it: the activations, when the forward pass had ended."""
    whole: dict[Kind, int] = {**dict.fromkeys(KINDS, 0), "temporary": parts["temporary"]}
    now: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    kinds: dict[int, Kind] = {}
    for event in events:
        if event.what == _WORKSPACE:
            continue
        if (old := kinds.pop(event.block, None)) is not None:
            now[old] -= sizes[event.block]
        if event.what != _FREE:
            kinds[event.block] = event.kind
            now[event.kind] += sizes[event.block]
            if event.kind not in ("activations", "temporary"):
                whole[event.kind] = max(whole[event.kind], now[event.kind])
    whole["activations"] = sum(sizes[block] for block in kept)
    return whole

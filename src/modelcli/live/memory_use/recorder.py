"""Record when tensors get their memory and when they give it back, while operators run on tensors without values."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.live.calls import Call, Calls
from modelcli.live.memory_use import workspaces
from modelcli.model.memory_log import Kind, MemoryLog


class Recorder(TorchDispatchMode):
    """Records the life of each storage that operators make: from the operator's end until nothing refers to it.

    It sees what the operators themselves return. What a kernel allocates and frees while it runs is not seen;
    `workspaces` knows some of that.

    Attributes:
        log: the record.
        calls: the calls of modules, which say what is running.
        between: called before each operator that runs outside of all modules.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = MemoryLog()
        self.calls: Calls | None = None
        self.between: Callable[[], None] | None = None
        self._device = device
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._is_on = True
        self._begun: list[int] = []
        self._paths: list[str | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and record the storages of what it returns."""
        if self.between is not None and (self.calls is None or self.calls.innermost is None):
            self.between()
        out = func(*args, **(kwargs or {}))
        if not self._is_on:
            return out
        path = self.path
        for tensor in _tensors(out):
            self.add(tensor, "activations" if self.log.phase == "forward" else "temporary", path)
        if func in workspaces.MULTIPLICATIONS:
            self.log.multiplies.add(self.log.phase)
        elif (needed := workspaces.of_convolution(func, args, out)) is not None:
            self.log.need_workspace(needed, path)
        elif (hidden := workspaces.hidden(func, args)) is not None:
            self.log.free(self.log.allocate(hidden, "temporary", path))
        return out

    def add(self, tensor: torch.Tensor, kind: Kind, path: str | None = None) -> None:
        """Record the storage of a tensor, unless it is known or on another device."""
        storage = _storage(tensor)
        if storage is None or storage.device.type != self._device:
            return
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        block = self.log.allocate(nbytes, kind, path)
        self._alive[key] = block, weakref.ref(storage, self._when_freed(key, block))

    def become(self, tensor: torch.Tensor, kind: Kind) -> None:
        """Record that a known storage is of another kind from now on."""
        storage = _storage(tensor)
        if storage is not None and storage._cdata in self._alive:
            self.log.become(self._alive[storage._cdata][0], kind)

    def stop(self) -> None:
        """Record nothing more."""
        self._is_on = False
        self._alive.clear()

    def _when_freed(self, key: int, block: int) -> Callable[[Any], None]:
        def freed(_reference: Any) -> None:
            if self._is_on:
                del self._alive[key]
                self.log.free(block)

        return freed

    @property
    def path(self) -> str | None:
        """The path of the module that is running, or whose backward is; None if none is."""
        assert self.calls is not None
        if (inside := self.calls.innermost) is not None:
            return inside
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return None
        index = bisect_right(self._begun, node._sequence_nr()) - 1
        return self._paths[index] if index >= 0 else None

    # A listener of `Calls`: which module made a node of the graph is known by the numbers of the nodes.

    def begins(self, _call: Call, _args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> None:
        self._note_path()

    def ends(self, _call: Call, _output: Any) -> None:
        self._note_path()

    def _note_path(self) -> None:
        assert self.calls is not None
        self._begun.append(torch._C._autograd._get_sequence_nr())
        self._paths.append(self.calls.innermost)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return the storage of a tensor; None for a sparse one and others that have none."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in what an operator returns."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)

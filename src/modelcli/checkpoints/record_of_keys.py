"""The blueprint of a state-dict model as a record has it: only what the keys, shapes and dtypes of its file do not say.

That is whether its parameters are trained. A million keys are said once that way, by the file, and not twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelcli.model.blueprint import Blueprint, Trace, from_keys
from modelcli.model.paths import ancestors, parent_of
from modelcli.model.tensors import TensorInfo

#: The forward pass of every such model.
NO_TRACE = Trace(None, reason="the file records no architecture: pass --arch REFERENCE", device=None)


@dataclass(frozen=True)
class KeysOfFile:
    """Stands for the blueprint that the keys of a file give.

    Attributes:
        tensors: how many there were when the record was written.
        checksum: the CRC-32 of their names, shapes and dtypes, to notice that the file has others by now.
        requires_grad: the flags of parameters by paths: that of the parameter itself, or of the closest module above it
            that is listed. Of those without one it is not known whether they are trained.
    """

    tensors: int
    checksum: int
    requires_grad: Mapping[str, bool]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"tensors": self.tensors, "checksum": self.checksum, "requires_grad": dict(self.requires_grad)}

    def disagreement(self, tensors: Sequence[TensorInfo]) -> str | None:
        """Why these are not the tensors that the record was written with, as a part of a sentence, or None."""
        if len(tensors) != self.tensors:
            return f"the file holds {len(tensors):,} tensors, and it is about {self.tensors:,}"
        if checksum_of(tensors) != self.checksum:
            return "the names, shapes or dtypes of the tensors in the file are not those that it is about"
        return None

    def blueprint(
        self, tensors: Iterable[TensorInfo], pay: Callable[[int], None] = lambda _characters: None
    ) -> Blueprint:
        """Return the blueprint of the tensors of a file, in its order; for `pay` see `model.blueprint.from_keys`.

        Modules stand in the order of their first keys, each module's own parameters before its buffers.
        """
        tree = from_keys(tensors, pay=pay)
        places = {module.path: place for place, module in enumerate(tree.modules)}
        ordered = sorted(tree.tensors, key=lambda info: 2 * places[parent_of(info.name)] + (info.kind == "buffer"))
        if self.requires_grad:
            ordered = self._with_flags(ordered)
        return Blueprint(tree.modules, tuple(ordered), NO_TRACE)

    def _with_flags(self, tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
        flags = self.requires_grad
        below: dict[str, bool | None] = {}  # the flag of the parameters of a module that are not listed themselves
        found = []
        for info in tensors:
            flag = None
            if info.kind == "parameter" and (flag := flags.get(info.name)) is None:
                path = parent_of(info.name)
                if path not in below:
                    below[path] = next((flags[above] for above in ancestors(path) if above in flags), None)
                flag = below[path]
            found.append(info if flag is None else _with_flag(info, flag))
        return found


def keys_of(blueprint: Blueprint) -> KeysOfFile:
    """Return what of a blueprint the keys of its file do not say."""
    return KeysOfFile(len(blueprint.tensors), checksum_of(blueprint.tensors), _flags_by_path(blueprint))


def from_json(document: Mapping[str, Any]) -> KeysOfFile:
    """The inverse of `KeysOfFile.to_json`. Raises KeyError, TypeError or ValueError on anything else."""
    tensors, checksum, flags = document["tensors"], document["checksum"], document["requires_grad"]
    if not all(type(number) is int and number >= 0 for number in (tensors, checksum)):
        raise ValueError("counts were expected")
    if not isinstance(flags, dict) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise TypeError("flags by paths were expected")
    return KeysOfFile(tensors, checksum, flags)


def checksum_of(tensors: Iterable[TensorInfo]) -> int:
    """Return the CRC-32 of the names, shapes and dtypes of tensors, in whatever order they are."""
    lines = sorted(f"{info.name}\n{info.shape} {info.dtype}" for info in tensors)
    return zlib.crc32("\n".join(lines).encode("utf-8", "surrogatepass"))


def _with_flag(info: TensorInfo, flag: bool) -> TensorInfo:
    return TensorInfo(
        info.name, info.shape, info.dtype, info.kind, flag and info.is_differentiable, info.tied_to, info.persistent,
        info.layout, info.stored_bytes,
    )  # fmt: skip


def _flags_by_path(blueprint: Blueprint) -> dict[str, bool]:
    """The flags of the parameters, where all below a module have one: that of the module alone."""
    parameters = [info for info in blueprint.tensors if info.kind == "parameter" and _says_something(info)]
    if len(known := {info.requires_grad for info in parameters}) <= 1:
        flag = next(iter(known), None)
        return {} if flag is None else {"": flag}
    found: dict[str, bool | None] = {}  # the flag of all parameters below a module
    mixed: set[str] = set()  # the modules below which there are several
    for info in parameters:
        flag = info.requires_grad
        for path in ancestors(parent_of(info.name)):
            if path in mixed or (path in found and found[path] is flag):
                break  # and so it is with all above it
            if path in found:
                mixed.add(path)
            found[path] = flag
    by_module = {
        path: flag
        for path, flag in found.items()
        if flag is not None and path not in mixed and (not path or parent_of(path) in mixed)
    }
    own = ((info.name, info.requires_grad) for info in parameters if parent_of(info.name) in mixed)
    return by_module | {name: flag for name, flag in own if flag is not None}


def _says_something(info: TensorInfo) -> bool:
    """Whether its flag is not what its dtype says: whole numbers are never trained."""
    return info.requires_grad is None or info.is_differentiable

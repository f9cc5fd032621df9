"""The blueprint of a state-dict model as a record has it: only what the keys, shapes and dtypes of its file do not say.

That is whether its parameters are trained. A million keys are said once that way, by the file, and not twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelcli.checkpoints.entries import buffers_by_name
from modelcli.model.blueprint import Blueprint, ModuleInfo, Trace, depth_first, from_keys
from modelcli.model.dtypes import is_differentiable
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

    def blueprint(self, tensors: Iterable[TensorInfo], pay: Callable[[int], None] | None = None) -> Blueprint:
        """Return the blueprint of the tensors of a file, in its order; for `pay` see `model.blueprint.from_keys`.

        Modules stand in the order of their first keys, each module's own parameters before its buffers.
        """
        tree = from_keys(tensors, pay=pay)
        positions = {module.path: position for position, module in enumerate(tree.modules)}
        ordered = sorted(tree.tensors, key=lambda info: 2 * positions[parent_of(info.name)] + (info.kind == "buffer"))
        if self.requires_grad:
            ordered = self._with_flags(ordered)
        return Blueprint(tree.modules, tuple(ordered), NO_TRACE)

    def _with_flags(self, tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
        flags = zip(tensors, self.flags_of(tensors), strict=True)
        return [info if flag is None else _with_flag(info, flag) for info, flag in flags]

    def flags_of(self, tensors: Sequence[TensorInfo]) -> list[bool | None]:
        """Return the flag of each of these tensors; None for a buffer, or where it is not known."""
        flags = self.requires_grad
        if flags.keys() <= {""}:
            flag = flags.get("")
            wanted = [flag if info.kind == "parameter" else None for info in tensors]
        else:
            below: dict[str, bool | None] = {}  # the flag of the parameters of a module that are not listed themselves
            wanted = []
            for info in tensors:
                flag = None
                if info.kind == "parameter" and (flag := flags.get(info.name)) is None:
                    flag = _closest(parent_of(info.name), flags, below)
                wanted.append(flag)
        trainable = {dtype: is_differentiable(dtype) for dtype in {info.dtype for info in tensors}}
        return [flag and trainable[info.dtype] for info, flag in zip(tensors, wanted, strict=True)]

    def gives(self, blueprint: Blueprint, names: Iterable[str]) -> bool:
        """Whether `blueprint`, of a file with tensors of these names in this order, would be this one.

        The tensors of `blueprint` have these names. It makes no blueprint to compare: there may be 100,000 tensors.
        """
        if blueprint.trace != NO_TRACE or blueprint.landmarks or not all(map(_is_plain, blueprint.modules)):
            return False
        tensors = blueprint.tensors
        if not all(info.tied_to is None and info.persistent for info in tensors):
            return False
        buffers = {info.name for info in tensors if info.kind == "buffer"}
        if buffers != buffers_by_name([info.name for info in tensors], [info.dtype for info in tensors]):
            return False
        listed = [*names]
        holders = [name.rpartition(".")[0] for name in listed]
        paths = depth_first(holders)
        if [module.path for module in blueprint.modules] != paths:
            return False
        positions = dict(zip(paths, range(0, 2 * len(paths), 2), strict=True))
        order = [*map(positions.__getitem__, holders)]
        if buffers:
            order = [position + (name in buffers) for position, name in zip(order, listed, strict=True)]
        if order != sorted(order):
            listed = [listed[number] for number in sorted(range(len(listed)), key=order.__getitem__)]
        return listed == [info.name for info in tensors] and self.flags_of(tensors) == [
            info.requires_grad for info in tensors
        ]


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
    tensors = tuple(tensors)
    texts = {alike: f"{alike[0]} {alike[1]}" for alike in {(info.shape, info.dtype) for info in tensors}}
    lines = sorted([f"{info.name}\n{texts[info.shape, info.dtype]}" for info in tensors])
    return zlib.crc32("\n".join(lines).encode("utf-8", "surrogatepass"))


def _closest(path: str, flags: Mapping[str, bool], known: dict[str, bool | None]) -> bool | None:
    """Return the flag of the closest module, from this one upwards, that has one; `known` remembers it for each."""
    walked = []
    while path not in known:
        walked.append(path)
        if path in flags or not path:
            known[path] = flags.get(path)
        else:
            path = parent_of(path)
    flag = known[path]
    known.update(dict.fromkeys(walked, flag))
    return flag


def _is_plain(module: ModuleInfo) -> bool:
    """Whether nothing but the path of a module is known."""
    return module.type is None and not (
        module.bases or module.config or module.shared_with or module.own_repr or module.absent
    )


def _with_flag(info: TensorInfo, flag: bool) -> TensorInfo:
    return TensorInfo(
        info.name, info.shape, info.dtype, info.kind, flag, info.tied_to, info.persistent, info.layout,
        info.stored_bytes,
    )  # fmt: skip


def _flags_by_path(blueprint: Blueprint) -> dict[str, bool]:
    """The flags of the parameters, where all below a module have one: that of the module alone."""
    trainable = {dtype: is_differentiable(dtype) for dtype in {info.dtype for info in blueprint.tensors}}
    parameters = [  # without those whose flag is what their dtype says: whole numbers are never trained
        info
        for info in blueprint.tensors
        if info.kind == "parameter" and (info.requires_grad is None or trainable[info.dtype])
    ]
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

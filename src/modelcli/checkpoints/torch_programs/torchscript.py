"""Read the tensors of a TorchScript archive, as `torch.jit.load(...).state_dict()` has them. Its code is not run."""

from __future__ import annotations

import re
from typing import Any, BinaryIO

from modelcli.checkpoints import limits
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.torch_pickle import composite_tensors, nested_tensors
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque
from modelcli.checkpoints.torch_pickle.zip_format import Archive
from modelcli.checkpoints.torch_programs.archives import with_file
from modelcli.errors import FileFormatError
from modelcli.model.tensors import Kind

_CLASS = re.compile(r"^class (\w+)\(.*?\):\n((?:  .*\n?)*)", re.MULTILINE)
_TABLE = re.compile(r"^  __(parameters|buffers)__ = \[(.*?)\]", re.MULTILINE)
_NAME = re.compile(r'"((?:[^"\\]|\\.)*)"')


def read(candidate: Candidate) -> Contents:
    """Read the tensors of a TorchScript archive."""
    return with_file(candidate, _read)


def _read(archive: Archive, file: BinaryIO) -> Contents:
    """Read the parameters and buffers that `torch.jit.load(...).state_dict()` has, under the same names.

    Raises FileFormatError if the archive is damaged or its modules are not those of TorchScript.
    """
    pickled = archive.pickled(file)
    tables = _Tables(archive, file)
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    kinds: dict[str, Kind] = {}
    types: dict[str, str] = {}
    hidden: list[str] = []
    stack: list[tuple[Any, str, tuple[int, ...]]] = [(pickled.value, "", ())]
    while stack:
        module, prefix, parents = stack.pop()
        if not _is_object(module):
            name = f"{prefix.removesuffix('.')} is" if prefix else "the top-level value is"
            raise FileFormatError.damaged(str(archive.path), f"{name} not a TorchScript module")
        limits.NESTING.check(len(parents), f"{archive.path}: its tree of modules")
        types[prefix.removesuffix(".")] = module.call.name
        parameters, buffers = tables.of(module.call)
        children = []
        for name, value in module.state.items():
            pickled.budget.spend(limits.ENTRY + len(prefix) + len(str(name)))
            if composite_tensors.is_tensor(value) and (
                parameters is None or name in parameters or name in (buffers or ())
            ):
                where = f"{archive.path}: {prefix}{name}"
                is_plain = isinstance(value, TensorEntry)
                tensors[prefix + name] = value if is_plain else composite_tensors.entry_of(value, where, pickled.budget)
                if parameters is not None:
                    kinds[prefix + name] = "parameter" if name in parameters else "buffer"
            elif _is_object(value) and id(value) not in parents:
                children.append((value, f"{prefix}{name}.", (*parents, id(module))))
            elif not _is_object(value) and nested_tensors.may_hold_tensors(_without_tag(value), pickled.budget):
                hidden.append(prefix + name)
        stack += reversed(children)
    if archive.has_any("constants/"):
        hidden.append("the constants of the code")
    return Contents(
        path=archive.path,
        format="jit",
        tensors=tensors,
        foreign=pickled.foreign,
        notes=(f"{archive.path.name} is a TorchScript program: modelcli shows its tensors and does not run its code",),
        types=types,
        kinds=kinds,
        hidden=tuple(hidden),
        is_program=True,
    )


def _is_object(value: Any) -> bool:
    return (
        isinstance(value, Opaque)
        and isinstance(value.call, Global)
        and value.call.module.partition(".")[0] == "__torch__"
        and isinstance(value.state, dict)
        and all(isinstance(name, str) for name in value.state)
    )


def _without_tag(value: Any) -> Any:
    """Return a list or dict without the calls by which TorchScript states its type."""
    while isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.module == "torch.jit._pickle":
        if value.call.name in ("build_intlist", "build_doublelist", "build_boollist"):
            return None  # numbers alone
        if value.call.name not in ("restore_type_tag", "build_tensorlist") or not value.args:
            break
        value = value.args[0]
    return value


class _Tables:
    """Reads from the code of the archive which attributes of a class are parameters and which are buffers."""

    def __init__(self, archive: Archive, file: BinaryIO) -> None:
        self.archive = archive
        self.file = file
        self._files: dict[str, dict[str, dict[str, frozenset[str]]]] = {}

    def of(self, kind: Global) -> tuple[frozenset[str] | None, frozenset[str] | None]:
        """Return the names of the parameters and of the buffers of a class; None if the code does not list them."""
        name = f"code/{kind.module.replace('.', '/')}.py"
        if name not in self._files:
            self._files[name] = self._classes(name)
        tables = self._files[name].get(kind.name)
        return (None, None) if tables is None else (tables.get("parameters"), tables.get("buffers"))

    def _classes(self, name: str) -> dict[str, dict[str, frozenset[str]]]:
        if f"{self.archive.prefix}{name}" not in self.archive.entries:
            return {}
        text = self.archive.small(self.file, name).decode("utf-8", "replace")
        return {
            found[1]: {table[1]: frozenset(_NAME.findall(table[2])) for table in _TABLE.finditer(found[2])}
            for found in _CLASS.finditer(text)
        }

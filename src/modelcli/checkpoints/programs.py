"""Programs with their weights in one archive: TorchScript (`torch.jit.save`) and `torch.export.save`.

Their tensors are shown, and can be written as a checkpoint. Their code is not looked at, let alone run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from modelcli.checkpoints import limits, shapes, strict_json
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.storage import Storage
from modelcli.checkpoints.torch_pickle import composite_tensors, embedded, nested_tensors, trees
from modelcli.checkpoints.torch_pickle.pickles import Global, Opaque
from modelcli.errors import FileFormatError, RequestError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Kind

if TYPE_CHECKING:
    from modelcli.checkpoints.torch_pickle.zip_format import Archive

#: The formats of what is read here: all that can be kept of such a file are its tensors.
FORMATS = frozenset({"jit", "pt2"})
_CLASS = re.compile(r"^class (\w+)\(.*?\):\n((?:  .*\n?)*)", re.MULTILINE)
_TABLE = re.compile(r"^  __(parameters|buffers)__ = \[(.*?)\]", re.MULTILINE)
_NAME = re.compile(r'"((?:[^"\\]|\\.)*)"')
#: The numbers of dtypes in `torch._export.serde.schema.ScalarType`.
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    9: "complex32",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
}
_STRIDED = 7
_CONFIG = "_weights_config.json"


def refuse_key(key: str | None, path: Path) -> None:
    if key is not None:
        raise RequestError(f"--key {key} is for training checkpoints, and {path} is a program with one state dict")


# --- TorchScript ---------------------------------------------------------------------------------------------------


def is_torchscript(names: Mapping[str, Any]) -> bool:
    """Whether an archive with these records is one of `torch.jit.save`."""
    return any(name.endswith("/constants.pkl") and name.count("/") == 1 for name in names)


def read_torchscript(archive: Archive, file: BinaryIO) -> Contents:
    """The parameters and buffers that `torch.jit.load(...).state_dict()` has, by the same names.

    Raises FileFormatError where the archive is damaged, or its modules are not made as TorchScript makes them.
    """
    pickled = archive.pickled(file)
    tables = _Tables(archive, file)
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    kinds: dict[str, Kind] = {}
    types: dict[str, str] = {}
    hidden: list[str] = []
    stack: list[tuple[Any, str, tuple[int, ...]]] = [(pickled.value, "", ())]
    while stack:
        module, prefix, above = stack.pop()
        if not _is_object(module):
            raise FileFormatError(
                f"{archive.path}: what stands at {prefix or 'the root'} is no module of TorchScript's"
            )
        limits.NESTING.check(len(above), f"{archive.path}: its tree of modules")
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
            elif _is_object(value) and id(value) not in above:
                children.append((value, f"{prefix}{name}.", (*above, id(module))))
            elif not _is_object(value) and nested_tensors.may_hold_tensors(_without_tag(value), pickled.budget):
                hidden.append(prefix + name)
        stack += reversed(children)
    if archive.has_any("constants/"):
        hidden.append("what the code has for constants")
    return Contents(
        path=archive.path,
        format="jit",
        tensors=tensors,
        foreign=pickled.foreign,
        notes=(f"{archive.path.name} is a TorchScript program: its tensors are shown, and its code is not run",),
        types=types,
        kinds=kinds,
        hidden=tuple(hidden),
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
    """A list or dict as it is, without the call by which TorchScript says of what type it is."""
    while isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.module == "torch.jit._pickle":
        if value.call.name in ("build_intlist", "build_doublelist", "build_boollist"):
            return None  # numbers alone
        if value.call.name not in ("restore_type_tag", "build_tensorlist") or not value.args:
            break
        value = value.args[0]
    return value


class _Tables:
    """Which attributes of a class are parameters and which are buffers, as the code of the archive lists them."""

    def __init__(self, archive: Archive, file: BinaryIO) -> None:
        self.archive = archive
        self.file = file
        self._files: dict[str, dict[str, dict[str, frozenset[str]]]] = {}

    def of(self, kind: Global) -> tuple[frozenset[str] | None, frozenset[str] | None]:
        """Its parameters and its buffers; None where the code does not say it."""
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


# --- torch.export --------------------------------------------------------------------------------------------------


def is_exported(names: Mapping[str, Any]) -> bool:
    """Whether an archive with these records is one of `torch.export.save`."""
    ends = ("archive_format", "serialized_exported_program.json")
    return any(name == end or name.endswith(f"/{end}") for name in names for end in ends)


def read_exported(archive: Archive, file: BinaryIO) -> Contents:
    """The state dict of an exported program: by the account of its weights, or as the state dict that it holds."""
    names = list(archive.entries)
    configs = [name for name in names if name.endswith(_CONFIG) and "/weights/" in f"/{name}"]
    whole = [name for name in names if name.endswith(("serialized_state_dict.pt", "data/weights/model.pt"))]
    note = f"{archive.path.name} is a program of torch.export: its tensors are shown, and it is not run"
    foreign = ("torch.export.ExportedProgram",)
    hidden = ("what the program has for constants",) if any(_constants_in(archive)) else ()
    if len(configs) == 1:
        tensors, kinds = _configured(archive, file, configs[0])
        return Contents(archive.path, "pt2", tensors, kinds=kinds, foreign=foreign, notes=(note,), hidden=hidden)
    if len(whole) == 1 and archive.entries[whole[0]].stored:
        entry = archive.entries[whole[0]]
        place = embedded.Place(archive.path, entry.offset, entry.nbytes, archive.identity, entry.name)
        found = trees.contents_of(archive.path, embedded.read(place), None)
        return Contents(
            archive.path,
            "pt2",
            found.tensors,
            extras=found.extras,
            inner=found.inner,
            foreign=(*foreign, *found.foreign),
            notes=(note, *found.notes),
            unseen=found.unseen,
            hidden=(*hidden, *found.hidden),
        )
    held = f"{len(configs)} accounts of weights" if configs else "no account of its weights that is known here"
    raise FileFormatError(
        f"{archive.path} is a program of torch.export with {held}",
        "torch.save(torch.export.load(file).state_dict, 'out.pth') where it can be loaded",
    )


def _constants_in(archive: Archive) -> Iterator[bool]:
    """Whether tensors may lie in each record of constants: buffers that are in no state dict, and plain attributes."""
    for name, entry in archive.entries.items():
        if name.endswith(("serialized_constants.pt", "constants/model.pt")) and entry.stored:
            pickled = embedded.read(embedded.Place(archive.path, entry.offset, entry.nbytes, archive.identity, name))
            yield nested_tensors.may_hold_tensors(pickled.value, pickled.budget)
        elif name.endswith("serialized_constants.pt") or "/constants/" in f"/{name}":
            yield not name.endswith(".json")


def _configured(
    archive: Archive, file: BinaryIO, config: str
) -> tuple[dict[str, TensorEntry | CompositeEntry], dict[str, Kind]]:
    where = f"{archive.path}: {config}"
    try:
        document = strict_json.loads(archive.small(file, config.removeprefix(archive.prefix)), where)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is no account of weights: {error}") from None
    entries = document.get("config") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        raise FileFormatError(f"{where} is no account of weights")
    storages: dict[str, Storage] = {}
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    kinds: dict[str, Kind] = {}
    folder = config.rpartition("/")[0].removeprefix(archive.prefix)
    limits.check_names(entries, where)
    for name, entry in entries.items():
        try:
            tensors[name] = _tensor(archive, folder, entry, storages, f"{where}: {name}")
            kinds[name] = "parameter" if entry["is_param"] else "buffer"
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{where}: {name} is not described as a tensor: {error!r}") from None
    return tensors, kinds


def _tensor(archive: Archive, folder: str, entry: Any, storages: dict[str, Storage], where: str) -> TensorEntry:
    meta, record = entry["tensor_meta"], f"{folder}/{entry['path_name']}"
    if entry["use_pickle"] or meta["layout"] != _STRIDED or meta["dtype"] not in _DTYPES:
        raise FileFormatError(f"{where} is no dense tensor of a dtype that is known here")
    dtype = _DTYPES[meta["dtype"]]
    if record not in storages:
        storages[record] = archive.bytes_of(record)
    shape = shapes.shape(tuple(size["as_int"] for size in meta["sizes"]), where)
    stride = shapes.sizes(tuple(size["as_int"] for size in meta["strides"]), where)
    (offset,) = shapes.sizes((meta["storage_offset"]["as_int"],), where)
    last = shapes.extent(shape, stride)
    needed = (offset + last) * ITEM_BYTES[dtype] if last else 0
    if needed > storages[record].nbytes:
        raise FileFormatError(f"{where} needs {needed:,} bytes, and its record holds {storages[record].nbytes:,}")
    return TensorEntry(shape, dtype, stride, offset, storages[record], bool(meta["requires_grad"]))


def prefix_of(where: str, names: Mapping[str, Any]) -> str:
    """The folder that all records of a program lie in, with its slash; empty where there is none.

    Raises FileFormatError where there are several.
    """
    prefixes = {name.partition("/")[0] + "/" if "/" in name else "" for name in names}
    if len(prefixes) != 1 and not is_exported({name: None for name in names if "/" not in name}):
        raise FileFormatError(f"{where} holds records in {len(prefixes)} folders, and torch writes one")
    return prefixes.pop() if len(prefixes) == 1 else ""

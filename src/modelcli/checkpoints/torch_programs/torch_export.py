"""Read the tensors of a program that `torch.export.save` wrote. The program itself is not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from modelcli.checkpoints import limits, shapes, strict_json
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.storage import Storage
from modelcli.checkpoints.torch_pickle import embedded, nested_tensors, trees
from modelcli.checkpoints.torch_pickle.zip_format import Archive
from modelcli.checkpoints.torch_programs.archives import with_file
from modelcli.errors import FileFormatError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Kind

#: The dtypes by their numbers in `torch._export.serde.schema.ScalarType`.
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
_SAVE_STATE_DICT = "with the torch that wrote it, run torch.save(torch.export.load(file).state_dict, 'out.pth')"


def read(candidate: Candidate) -> Contents:
    """Read the tensors of an exported program."""
    return with_file(candidate, _read)


def _read(archive: Archive, file: BinaryIO) -> Contents:
    """Read the state dict that the program's weights configuration describes, or the one that it contains whole."""
    names = list(archive.entries)
    configs = [name for name in names if name.endswith(_CONFIG) and "/weights/" in f"/{name}"]
    whole = [name for name in names if name.endswith(("serialized_state_dict.pt", "data/weights/model.pt"))]
    note = f"{archive.path.name} is a program of torch.export: modelcli shows its tensors and does not run it"
    foreign = ("torch.export.ExportedProgram",)
    hidden = ("the constants of the program",) if any(_constants_in(archive)) else ()
    if len(configs) == 1:
        tensors, kinds = _configured(archive, file, configs[0])
        return Contents(
            archive.path,
            "pt2",
            tensors,
            kinds=kinds,
            foreign=foreign,
            notes=(note,),
            hidden=hidden,
            is_program=True,
        )
    if len(whole) == 1 and archive.entries[whole[0]].stored:
        entry = archive.entries[whole[0]]
        span = embedded.ArchiveSpan(archive.path, entry.offset, entry.nbytes, archive.identity, entry.name)
        found = trees.contents_of(archive.path, embedded.read(span), None)
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
            is_program=True,
        )
    number = f"{len(configs)} files *{_CONFIG}" if configs else f"no file *{_CONFIG} and no state dict"
    raise FileFormatError(
        f"{archive.path} is a program of torch.export with {number}, so modelcli cannot find its weights",
        _SAVE_STATE_DICT,
    )


def _constants_in(archive: Archive) -> Iterator[bool]:
    """Yield for each record of constants whether it may contain tensors (non-persistent buffers, plain attributes)."""
    for name, entry in archive.entries.items():
        if name.endswith(("serialized_constants.pt", "constants/model.pt")) and entry.stored:
            pickled = embedded.read(
                embedded.ArchiveSpan(archive.path, entry.offset, entry.nbytes, archive.identity, name)
            )
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
        raise FileFormatError.damaged(where, f"it does not describe weights: {error}") from None
    entries = document.get("config") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        raise FileFormatError.damaged(where, "it does not describe weights: it has no object named config")
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
            raise FileFormatError.damaged(
                where, f"the description of {name} is not that of a tensor: {error!r}"
            ) from None
    return tensors, kinds


def _tensor(archive: Archive, folder: str, entry: Any, storages: dict[str, Storage], where: str) -> TensorEntry:
    meta, record = entry["tensor_meta"], f"{folder}/{entry['path_name']}"
    if entry["use_pickle"] or meta["layout"] != _STRIDED or meta["dtype"] not in _DTYPES:
        raise FileFormatError(
            f"{where} is not a dense tensor of a dtype that modelcli knows",
            _SAVE_STATE_DICT,
        )
    dtype = _DTYPES[meta["dtype"]]
    if record not in storages:
        storages[record] = archive.bytes_of(record)
    shape = shapes.shape(tuple(size["as_int"] for size in meta["sizes"]), where)
    stride = shapes.sizes(tuple(size["as_int"] for size in meta["strides"]), where)
    (offset,) = shapes.sizes((meta["storage_offset"]["as_int"],), where)
    last = shapes.extent(shape, stride)
    needed = (offset + last) * ITEM_BYTES[dtype] if last else 0
    if needed > storages[record].nbytes:
        raise FileFormatError.damaged(
            where, f"it needs {needed:,} bytes, but the record {record} holds {storages[record].nbytes:,}"
        )
    return TensorEntry(shape, dtype, stride, offset, storages[record], bool(meta["requires_grad"]))

"""The format of `torch.save` since 1.6: a zip archive of stored records, with the tree of values as a pickle."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelcli import record as records
from modelcli.blueprint import ITEM_BYTES
from modelcli.checkpoints import pickles
from modelcli.checkpoints.contents import Contents, Span, TensorEntry, identity_of
from modelcli.errors import FileFormatError, RequestError, SystemFailureError, UnsafeError, did_you_mean

MAX_PICKLE_BYTES = 64 * 1024 * 1024
#: Where a training checkpoint keeps its state dict, the commonest first.
STATE_DICT_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "weights",
    "params",
    "module",
    "ema",
    "model_ema",
    "state_dict_ema",
    "params_ema",
)


def read(path: Path, key: str | None) -> Contents:
    """Read the directory, the pickle and the record of a torch zip file; no tensor's bytes are touched."""
    identity = identity_of(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickle_name = _pickle_name(path, members)
            prefix = pickle_name.removesuffix("data.pkl")
            data = _read_member(path, archive, members[pickle_name])
            byteorder = members.get(f"{prefix}byteorder")
            if byteorder is not None and archive.read(byteorder) not in (b"little", b""):
                raise FileFormatError(f"{path} was written on a big-endian machine", "load and save it with torch")
            recorded = members.get(f"{prefix}{records.ZIP_RECORD}")
            record_text = _read_member(path, archive, recorded) if recorded else None
    except zipfile.BadZipFile as error:
        raise FileFormatError(f"{path} is a damaged zip file: {error}", "it may have been cut off") from None
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    pickled = pickles.read(data, f"{path}: {pickle_name}")
    keys, state_dict, notes = _find_state_dict(path, pickled, key)
    storages = _Storages(path, prefix, members, identity)
    tensors = {
        name: storages.entry(name, value) for name, value in state_dict.items() if isinstance(value, pickles.Tensor)
    }
    extras = {name: value for name, value in state_dict.items() if not isinstance(value, pickles.Tensor)}
    state = state_dict.state if isinstance(state_dict, pickles.OrderedDict) else None
    metadata = state.get("_metadata") if state else None
    if not isinstance(metadata, dict):
        metadata = {}
    return Contents(
        path=path,
        format="pth",
        tensors=tensors,
        extras=extras,
        metadata={name: value for name, value in metadata.items() if name != records.METADATA_KEY},
        record=_record(record_text, metadata),
        tree=storages.resolved(pickled.value) if keys else None,
        key=keys or None,
        foreign=pickled.foreign,
        notes=notes,
    )


def _pickle_name(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> str:
    names = [name for name in members if name == "data.pkl" or (name.count("/") == 1 and name.endswith("/data.pkl"))]
    if len(names) == 1:
        prefix = names[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in members:
            raise FileFormatError(f"{path} is a torch.jit archive", "save its state_dict() with torch.save instead")
        return names[0]
    if names:
        raise FileFormatError(f"{path} holds {len(names)} files named data.pkl: {', '.join(names[:3])}")
    raise FileFormatError(f"{path} is a zip file, but none that torch.save wrote: it holds no data.pkl")


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_PICKLE_BYTES:
        raise FileFormatError(f"{path}: {info.filename} is {info.file_size:,} bytes; the limit is {MAX_PICKLE_BYTES:,}")
    return archive.read(info)


def _record(zip_text: bytes | None, metadata: Mapping[str, Any]) -> records.Record | None:
    """The embedded record. Where the two copies differ, the zip record wins."""
    for text in (zip_text, metadata.get(records.METADATA_KEY)):
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        if isinstance(text, str) and (record := records.from_text(text)) is not None:
            return record
    return None


def _find_state_dict(
    path: Path, pickled: pickles.Pickle, key: str | None
) -> tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]:
    """Where the state dict stands in the tree, the state dict, and what to tell about the choice."""
    tree = pickled.value
    if key is not None:
        return _at_key(path, tree, key)
    if _is_state_dict(tree):
        return (), tree, ()
    if isinstance(tree, dict):
        candidates = [name for name in STATE_DICT_KEYS if _is_state_dict(tree.get(name))]
        candidates += [
            name
            for name, value in tree.items()
            if isinstance(name, str) and name not in candidates and _is_state_dict(value)
        ]
        if candidates:
            chosen, *others = candidates
            note = f"took the state dict under {chosen!r} of {path.name}"
            if others:
                note += f"; --key takes another: {', '.join(others[:6])}"
            return (chosen,), tree[chosen], (note,)
        if not tree:
            return (), tree, ()
    if pickled.foreign:
        raise UnsafeError(
            f"{path} holds no plain state dict, but objects of {', '.join(pickled.foreign[:3])}; "
            "to load them would run code",
            "save model.state_dict() where the model was made, and use that file",
        )
    what = (
        f"a dict with the keys {', '.join(map(repr, list(tree)[:6]))}"
        if isinstance(tree, dict)
        else type(tree).__name__
    )
    raise FileFormatError(f"{path} holds no state dict: it is {what}", "--key names the one to take")


def _at_key(path: Path, tree: Any, key: str) -> tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]:
    keys: tuple[str, ...] = ()
    value, rest = tree, key
    while rest:
        if not isinstance(value, dict):
            break
        step = rest if rest in value else rest.partition(".")[0]
        if step not in value:
            names = [name for name in value if isinstance(name, str)]
            hint = did_you_mean(step, names) or f"there are: {', '.join(names[:8])}"
            raise RequestError(f"no key {key!r} in {path}", hint)
        keys, value = (*keys, step), value[step]
        rest = rest[len(step) + 1 :]
    if not _is_state_dict(value):
        raise RequestError(f"what stands under the key {key!r} of {path} is not a state dict")
    return keys, value, ()


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and any(isinstance(item, pickles.Tensor) for item in value.values())
        and all(isinstance(name, str) for name in value)
        and not any(_is_state_dict(item) for item in value.values() if isinstance(item, dict))
    )


class _Storages:
    """The records `data/N` of an archive as spans of the file, each checked against the zip directory."""

    def __init__(
        self, path: Path, prefix: str, members: Mapping[str, zipfile.ZipInfo], identity: tuple[int, int, int]
    ) -> None:
        self.path = path
        self.prefix = prefix
        self.members = members
        self.identity = identity
        self.spans: dict[str, Span] = {}

    def span(self, key: str) -> Span:
        if key not in self.spans:
            self.spans[key] = self._locate(f"{self.prefix}data/{key}")
        return self.spans[key]

    def _locate(self, name: str) -> Span:
        info = self.members.get(name)
        if info is None:
            raise FileFormatError(f"{self.path} is damaged: record {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise FileFormatError(f"{self.path}: record {name} is compressed or encrypted; torch.save stores plainly")
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise FileFormatError(f"{self.path} is damaged: record {name} has no header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = info.header_offset + 30 + name_length + extra_length
        if offset + info.file_size > self.identity[0]:
            raise FileFormatError(f"{self.path} is cut off: record {name} ends behind the end of the file")
        return Span(self.path, offset, info.file_size, self.identity)

    def entry(self, name: str, tensor: pickles.Tensor) -> TensorEntry:
        span = self.span(tensor.storage.key)
        last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
        needed = (last + 1) * ITEM_BYTES[tensor.dtype] if 0 not in tensor.shape else 0
        if needed > span.nbytes:
            raise FileFormatError(
                f"{self.path}: {name} of shape {list(tensor.shape)} needs {needed:,} bytes, "
                f"and its record holds {span.nbytes:,}"
            )
        return TensorEntry(
            shape=tensor.shape,
            dtype=tensor.dtype,
            stride=tensor.stride,
            offset=tensor.offset,
            storage=span,
            requires_grad=tensor.requires_grad,
            is_parameter=tensor.is_parameter,
        )

    def resolved(self, value: Any, depth: int = 0) -> Any:
        """The tree with every tensor as the entry it is; everything else stays as inert as it was."""
        if depth > pickles.MAX_DEPTH:
            raise FileFormatError(f"{self.path}: nested deeper than {pickles.MAX_DEPTH}")
        match value:
            case pickles.Tensor():
                return self.entry("a tensor", value)
            case pickles.OrderedDict():
                made = pickles.OrderedDict((key, self.resolved(item, depth + 1)) for key, item in value.items())
                made.state = value.state
                return made
            case dict():
                return {key: self.resolved(item, depth + 1) for key, item in value.items()}
            case list() | tuple():
                return type(value)(self.resolved(item, depth + 1) for item in value)
            case pickles.Opaque():
                return pickles.Opaque(
                    value.call,
                    self.resolved(value.args, depth + 1),
                    self.resolved(value.state, depth + 1),
                    [(key, self.resolved(item, depth + 1)) for key, item in value.items],
                    [self.resolved(item, depth + 1) for item in value.appended],
                    value.how,
                )
            case _:
                return value

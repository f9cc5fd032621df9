"""The parsers that read files, as functions of bytes, with valid inputs as seeds."""

from __future__ import annotations

import io
import itertools
import json
import pickletools
import struct
import warnings
from pathlib import Path
from typing import Any

from modelcli import checkpoints
from modelcli.checkpoints import Span
from modelcli.checkpoints import record as records
from modelcli.checkpoints.torch_pickle import pickles, trees
from modelcli.checkpoints.zip_archives import directory as zip_directory
from modelcli.model import json_form
from modelcli.model.blueprint import from_keys
from modelcli.model.tensors import TensorInfo
from tests import hostile
from tests.fuzz.target import Target

_NAMES = [
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch.storage\nUntypedStorage\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nSize\n",
    b"cos\nsystem\n",
]
_OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
_ZIP = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08", b"archive/data/0"]
_JSON = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"-1", b"1e999", b"NaN", b'"\\ud800"', b"\xff"]
_RECORD = records.to_text(
    records.Record(
        reference="alexnet(num_classes=10)",
        weights=None,
        seed=0,
        edits=("replace a Linear(2,3)", "freeze a.b"),
        frozen=("a.weight",),
        numbers=(1, 2),
        edit_count=2,
        blueprint=from_keys([TensorInfo("a.weight", (2, 3), "float32"), TensorInfo("b", (), "int64", "buffer")]),
        input_size=((1, 3),),
    )
).encode()
_SAFETENSORS = hostile.safetensors(
    {"a": hostile.f32(0, 8, 2), "b": hostile.f32(8, 8, 0), "__metadata__": {"modelcli": _RECORD.decode()}}, bytes(8)
)


def every(folder: Path) -> list[Target]:
    """Return all parsers. Those that read files by path write them to `folder`."""
    path = folder / "made.pth"
    index = folder / "made.index.json"
    (folder / "shard.safetensors").write_bytes(hostile.safetensors({"a": hostile.f32(0, 8, 2)}, bytes(8)))

    def by_path(data: bytes) -> object:
        path.write_bytes(data)
        found = checkpoints.read(path)
        return found.bare_blueprint(), [entry.storage.bytes() for entry in found.tensors.values()]

    def by_index(data: bytes) -> object:
        index.write_bytes(data)
        return checkpoints.read(index)

    def pickled(data: bytes) -> object:
        span = Span(path, 0, 64, (0, 0, 0))
        read = pickles.read(data, "made", lambda _key, _dtype: span)
        return trees.contents_of(path, read, None).bare_blueprint()

    def packed(data: bytes) -> object:
        return by_path(hostile.archive(data))

    def directory(data: bytes) -> object:
        return zip_directory.read(io.BytesIO(data), len(data), "made")

    distributed = folder / "distributed"
    metadata = _distributed(distributed)

    def by_metadata(data: bytes) -> object:
        (distributed / ".metadata").write_bytes(data)
        found = checkpoints.read(distributed)
        return found.bare_blueprint(), [entry.storage.bytes() for entry in found.tensors.values()]

    pickle_seeds = [item for item in map(_pickle_of, hostile.pickled()) if len(item) < 5000] + list(_saved())
    archives = [hostile.archive(), hostile.zip64(), *(item.data for item in hostile.zips() if len(item.data) < 5000)]
    legacies = [item.data for item in hostile.legacies()]
    map_ = b'{"metadata":{"total_size":8},"weight_map":{"a":"shard.safetensors"}}'
    words = _OPCODES + _NAMES
    return [
        Target("pickle", pickled, pickle_seeds, words),
        Target("pickle in an archive", packed, pickle_seeds[:20], words),
        Target("zip directory", directory, archives, _ZIP),
        Target("torch zip", by_path, archives, _ZIP + _NAMES),
        Target("torch before 1.6", by_path, legacies, [*words, struct.pack("<Q", 2)]),
        Target("safetensors", by_path, [_SAFETENSORS, hostile.safetensors({})], _JSON),
        Target("index of shards", by_index, [map_], [*_JSON, b"..", b"/", b"shard.safetensors", b"weight_map"]),
        Target("distributed metadata", by_metadata, [metadata], [*words, b"__0_0.distcp", b"../x"]),
        Target("record", lambda data: records.from_text(data.decode("utf-8", "replace")), [_RECORD], _JSON),
        Target("cache entry", _blueprint, [json.dumps(json.loads(_RECORD)["blueprint"]).encode()], _JSON),
    ]


def _pickle_of(item: hostile.Hostile) -> bytes:
    with_start = item.data.partition(b"archive/data.pkl")[2]
    return with_start[: with_start.index(b"PK\x03\x04")]


def _distributed(folder: Path) -> bytes:
    """Write a folder by `torch.distributed.checkpoint`. Returns the bytes of its `.metadata`."""
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is only one process
        state = {"model": {"a": torch.ones(2, 3), "b": torch.ones(())}, "epoch": 3, "list": [torch.ones(1), 2.5]}
        save(state, checkpoint_id=folder)
    return (folder / ".metadata").read_bytes()


def _saved() -> list[bytes]:
    """What torch's own pickler writes for tensors once its memo's numbers take four bytes, today and before 1.6."""
    return [_saved_tensors(b""), _saved_tensors(b"N")]


def _saved_tensors(view: bytes) -> bytes:
    """Three tensors whose storages are named with `view`, behind 256 things in the memo."""
    named = (_NAMES[0], hostile.text("storage"), _NAMES[2], hostile.text("cpu"), _NAMES[4])
    things = (*named, *[b"N"] * (255 - len(named)))
    start = b"\x80\x02}q\x00" + b"".join(b"%bq%c0" % (thing, number) for number, thing in enumerate(things, 1)) + b"("
    body = b""
    puts = (b"r" + struct.pack("<I", number) for number in itertools.count(256))
    for number in range(3):
        body += hostile.text(f"layer.{number}.weight") + next(puts)
        body += b"h\x01((h\x02h\x03" + hostile.text(str(number)) + next(puts) + b"h\x04K\x02" + view + b"t" + next(puts)
        body += b"QK\x00K\x02\x85" + next(puts) + b"K\x01\x85" + next(puts) + b"\x89h\x05)R" + next(puts)
        body += b"t" + next(puts) + b"R" + next(puts)
    return start + body + b"u."


def _blueprint(data: bytes) -> Any:
    try:
        return json_form.from_json(json.loads(data))
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
    ):  # the errors that the cache catches
        return None

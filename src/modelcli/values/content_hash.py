"""Hash the names, dtypes, shapes and values of tensors, whatever file they are in: the scheme `modelcli-hash-v1`.

The hash function is SHA-256. `u64(n)` is the number n as 8 bytes, the lowest first. `text(s)` is `u64` of the number of
UTF-8 bytes of s, then these bytes (a lone surrogate in a name is encoded as `surrogatepass` does). Each field tells
where it ends, so two different lists of fields never give the same input.

- Header: `text(dtype) u64(number of dimensions) u64(size)...`, with torch's name of the dtype without `torch.`.
- Plain tensor: SHA-256 of `text("modelcli-hash-v1 tensor")`, the header, and the elements in row-major order, each with
  the bytes that it has in memory, the lowest first. Nothing is converted: -0.0 and 0.0 differ, and so do two NaNs.
- Tensor that consists of others (quantized, sparse): SHA-256 of `text("modelcli-hash-v1 composite") text(layout)`, the
  header, `u64(number of settings) text(setting)...`, then `u64(number of parts)` and the 32 bytes of the hash of each
  part, which is a plain tensor.
- Model: SHA-256 of `text("modelcli-hash-v1 model")`, then `text(name)` and the 32 bytes of the tensor's hash for each
  tensor, sorted by the code points of the names. The hash of a module is that of its tensors, by their names in it.

Files are read in pieces on several threads. Each thread has 1 MiB of a tensor's bytes in memory, or 48 MiB where these
are not stored in row-major order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modelcli import ranks
from modelcli.checkpoints.byte_comparison import nbytes_of, settings_of
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.limits import Budget
from modelcli.checkpoints.storage import Span, Storage, is_in_sequence
from modelcli.checkpoints.torch_pickle.composite_tensors import class_of
from modelcli.checkpoints.torch_pickle.inert_values import Global
from modelcli.errors import RequestError
from modelcli.model.state_dict import split_key
from modelcli.model.tensors import Shape
from modelcli.ranks.shared_work import shared
from modelcli.values.ordered_work import in_order
from modelcli.values.reading import Reader, Readers
from modelcli.values.row_major import RowMajor, row_major

SCHEME = "modelcli-hash-v1"
#: How many bytes of a file are read at a time, and how many of other storages, which may compute them.
_READ, _COMPUTED = 1 << 20, 8 << 20
#: A thread gets a batch of tensors with about so many bytes, or with at most so many tensors.
_BATCH_BYTES, _BATCH_TENSORS = 1 << 22, 512
#: How many times the bytes of a file may be read, because tensors may be views of the same bytes.
_TIMES = 16

#: Called with the number of bytes done, and the total.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ModuleHash:
    """The hash of the tensors in a module and below it, how many there are, and the bytes of their values."""

    digest: bytes
    tensors: int
    nbytes: int


def u64(number: int) -> bytes:
    """Return a number as 8 bytes, the lowest first."""
    return number.to_bytes(8, "little")


def text(value: str) -> bytes:
    """Return a text as its length in bytes and its bytes in UTF-8."""
    data = value.encode("utf-8", "surrogatepass")
    return u64(len(data)) + data


def header(dtype: str, shape: Shape) -> bytes:
    """Return the bytes that stand for a dtype and a shape."""
    return text(dtype) + u64(len(shape)) + b"".join(map(u64, shape))


def require_hashable(entries: Mapping[str, TensorEntry | CompositeEntry]) -> None:
    """Raise RequestError for a tensor that has no values, or whose values only other code can interpret."""
    for name, entry in entries.items():
        if isinstance(entry, TensorEntry):
            continue
        if not entry.parts:
            raise RequestError(f"{name} has no values to hash: it was saved from the meta device", _LEAVE_OUT)
        if (kind := class_of(entry)) is not None:
            raise RequestError(f"{name} is a {kind}, whose values only the code of its class knows", _LEAVE_OUT)


_LEAVE_OUT = "hash the other tensors alone: modelcli hash MODEL -s SELECTOR"


def tensor_digests(
    entries: Mapping[str, TensorEntry | CompositeEntry], progress: Progress, what: str
) -> dict[str, bytes]:
    """Return the hash of each tensor by name. A view that has several names is read once.

    Args:
        entries: the tensors by name.
        progress: called with the number of bytes done, and the total.
        what: the name of the model in error messages.

    Raises:
        RequestError: a tensor cannot be hashed; the message names it.
        FileFormatError: views show far more elements than their storages have, or a file has changed.
    """
    require_hashable(entries)
    plain: dict[object, tuple[str, TensorEntry]] = {}
    for name, entry in entries.items():
        for part in _leaves(entry):
            plain.setdefault(_key(part), (name, part))
    found = _plain_digests(plain, progress, what)
    return {name: _digest(entry, found) for name, entry in entries.items()}


def _leaves(entry: TensorEntry | CompositeEntry) -> tuple[TensorEntry, ...]:
    return (entry,) if isinstance(entry, TensorEntry) else entry.parts


def _key(entry: TensorEntry) -> object:
    """Return what two plain tensors share if they are the same view, or if both are empty and look alike."""
    return entry.view or (entry.shape, entry.dtype)


def _digest(entry: TensorEntry | CompositeEntry, found: Mapping[object, bytes]) -> bytes:
    if isinstance(entry, TensorEntry):
        return found[_key(entry)]
    settings = [_setting(value) for value in settings_of(entry)]
    made = hashlib.sha256(text(f"{SCHEME} composite") + text(entry.layout) + header(entry.dtype, entry.shape))
    made.update(u64(len(settings)) + b"".join(map(text, settings)))
    made.update(u64(len(entry.parts)) + b"".join(found[_key(part)] for part in entry.parts))
    return made.digest()


def _setting(value: object) -> str:
    """Return a setting of a quantized tensor as text.

    The scheme is `per_tensor_affine` or `per_channel_affine` (also of scales that are float32, which the hash of the
    scales shows). The scale is a float as `float.hex` writes it, and zero point and axis are decimal numbers.
    """
    if isinstance(value, Global):
        return value.name.removesuffix("_float_qparams")
    if isinstance(value, list):
        return f"[{','.join(map(_setting, value))}]"
    return value.hex() if isinstance(value, float) else str(value)


# --- the bytes of plain tensors --------------------------------------------------------------------------------------

#: The key of a tensor, its name, the tensor, and its bytes in row-major order.
_Task = tuple[object, str, TensorEntry, Storage]


def _plain_digests(
    tensors: Mapping[object, tuple[str, TensorEntry]], progress: Progress, what: str
) -> dict[object, bytes]:
    sizes, group = [nbytes_of(entry) for _, entry in tensors.values()], ranks.current()
    total = sum(sizes)
    progress(0, total)
    started: dict[tuple[str, Shape], Any] = {}
    for _, entry in tensors.values():
        if (entry.dtype, entry.shape) not in started:
            head = text(f"{SCHEME} tensor") + header(entry.dtype, entry.shape)
            started[entry.dtype, entry.shape] = hashlib.sha256(head)

    def of_part(part: Mapping[object, tuple[str, TensorEntry]]) -> dict[object, bytes]:
        found: dict[object, bytes] = {}
        done = 0
        with Readers([entry for _, entry in part.values()]) as readers:

            def work_on(batch: list[_Task]) -> list[tuple[object, int, bytes]]:
                reader, results = readers.own(), []
                for key, _, entry, storage in batch:
                    made = started[entry.dtype, entry.shape].copy()
                    for piece in _pieces(storage, reader):
                        made.update(piece)
                    results.append((key, storage.nbytes, made.digest()))
                return results

            for batch in in_order(work_on, _batches(part, what)):
                for key, nbytes, digest in batch:
                    found[key] = digest
                    done += nbytes
                progress(group.moved(done, total), total)
        return found

    names = [name for name, _ in tensors.values()]
    return shared(tensors, names, sizes, of_part, group, pack=bytes.hex, unpack=bytes.fromhex)


def _pieces(storage: Storage, reader: Reader) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a storage in pieces, each valid until the next one."""
    if isinstance(storage, RowMajor) or is_in_sequence(storage):
        yield from storage.chunks()
        return
    step = _READ if isinstance(storage, Span) else _COMPUTED
    if storage.nbytes <= step:
        if storage.nbytes:
            yield reader.bytes(storage)
        return
    for start in range(0, storage.nbytes, step):
        yield reader.bytes(storage.part(start, min(step, storage.nbytes - start)))


def _batches(tensors: Mapping[object, tuple[str, TensorEntry]], what: str) -> Iterator[list[_Task]]:
    """Yield the tensors in batches that are large enough for a thread."""
    storages = {id(entry.storage): entry.storage.nbytes for _, entry in tensors.values()}
    budget = Budget(f"{what}: the bytes that its tensors view", sum(storages.values()), times=_TIMES)
    batch: list[_Task] = []
    nbytes = 0
    for key, (name, entry) in tensors.items():
        storage = row_major(entry)
        budget.spend(storage.nbytes, name)
        batch.append((key, name, entry, storage))
        nbytes += storage.nbytes
        if nbytes >= _BATCH_BYTES or len(batch) == _BATCH_TENSORS:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


# --- models and modules ----------------------------------------------------------------------------------------------


def model_digest(digests: Mapping[str, bytes]) -> bytes:
    """Return the hash of a model, given the hashes of its tensors by name."""
    made = hashlib.sha256(text(f"{SCHEME} model"))
    for name in sorted(digests):
        made.update(text(name) + digests[name])
    return made.digest()


def module_hashes(digests: Mapping[str, bytes], nbytes: Mapping[str, int]) -> dict[str, ModuleHash]:
    """Return the hash of each module by path, the model itself under `""`: what the module alone would have as a model.

    Args:
        digests: the hashes of all tensors by name.
        nbytes: the bytes of the values of each tensor.
    """
    made: dict[str, Any] = {"": hashlib.sha256(text(f"{SCHEME} model"))}
    counts: dict[str, list[int]] = {"": [0, 0]}
    for name in sorted(digests):  # names that begin alike are in the order of what follows
        for path in paths_above(name):
            if path not in made:
                made[path], counts[path] = hashlib.sha256(text(f"{SCHEME} model")), [0, 0]
            made[path].update(text(name[len(path) + 1 :] if path else name) + digests[name])
            counts[path][0] += 1
            counts[path][1] += nbytes[name]
    return {path: ModuleHash(hasher.digest(), *counts[path]) for path, hasher in made.items()}


def paths_above(name: str) -> Iterable[str]:
    """Return the paths of the modules that contain a tensor, from the model itself (`""`) down."""
    path, _ = split_key(name)
    if not path:
        return ("",)
    ends = [end for end, character in enumerate(path) if character == "."]
    return ("", *(path[:end] for end in ends if end), path)

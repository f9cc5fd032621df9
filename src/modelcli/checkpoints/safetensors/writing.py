"""Write `.safetensors` files: a JSON header, then the bytes of each tensor, tied ones once."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from modelcli.checkpoints import formats
from modelcli.checkpoints import record as records
from modelcli.checkpoints.copied import Rearranged
from modelcli.checkpoints.format import RecordTooLargeError
from modelcli.checkpoints.layout import LARGE, PAGE, HeaderLayout
from modelcli.checkpoints.plan import Plan, PlannedTensor, Source
from modelcli.checkpoints.record_reading import RESERVED
from modelcli.checkpoints.safetensors.reading import DTYPES, PAIRS
from modelcli.checkpoints.storage import Span
from modelcli.errors import RequestError, SystemFailureError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape

#: The length of the header, which comes before it.
_LENGTH = struct.Struct("<Q")
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {PAIRS: "F4"}
#: If all tensors together have at least this size, they start at a multiple of 4096, so that later edits copy fast.
_ALIGNED_FROM = 1024 * 1024


#: The largest header that safetensors' own reader accepts.
MAX_HEADER_BYTES = 100_000_000


def layout(plan: Plan) -> HeaderLayout:
    """Return the layout of a file.

    Raises:
        RequestError: the format does not have a dtype, or the names make the header too large.
        RecordTooLargeError: the record makes the header too large.
    """
    found = layout_of(unique(plan), texts_of(plan))
    nbytes = len(found.header) - _LENGTH.size
    if nbytes <= MAX_HEADER_BYTES:
        return found
    most = f"safetensors reads no header of more than {MAX_HEADER_BYTES:,} bytes"
    if plan.record:
        raise RecordTooLargeError(f"the header would have {nbytes:,} bytes with it, and {most}")
    raise RequestError(
        f"the names and shapes of {len(plan.tensors):,} tensors make a header of {nbytes:,} bytes, and {most}",
        "write a folder of shards, whose headers are smaller: -o out/",
    )


def unique(plan: Plan) -> Mapping[str, PlannedTensor]:
    """Return each tensor under its first name, in the plan's order. Each is row-major and uses all of its source."""
    first = plan.first_names
    if len(set(first.values())) == len(first):
        return plan.tensors
    return {name: tensor for name, tensor in plan.tensors.items() if first[name] == name}


def texts_of(plan: Plan) -> dict[str, str]:
    """Return the `__metadata__`: the source's texts, the other names of tied tensors as in `save_model`, the record."""
    record = {records.SAFETENSORS_KEY: plan.record} if plan.record else {}
    return {"format": "pt", **aliases_of(plan), **plan.texts, **record}


def aliases_of(plan: Plan) -> dict[str, str]:
    """Return the other names of tied tensors, each with the first one, except for names that are reserved."""
    first = plan.first_names
    return {name: other for name, other in first.items() if name != other and name not in RESERVED}


def layout_of(tensors: Mapping[str, PlannedTensor], texts: Mapping[str, str]) -> HeaderLayout:
    """Return the layout of tensors: the widest dtypes first, for alignment, then in the order of their source files."""
    _require_names(tensors)
    offsets: dict[str, int] = {}
    parts: list[tuple[int, Source]] = []
    body = 0
    for name in _in_order(tensors):
        offsets[name] = body
        source = tensors[name].source
        if nbytes := source.nbytes:
            parts.append((body, source))
            body += nbytes
    # Written entry by entry: as one value of dicts and lists, the header of 100,000 tensors takes 60 MB.
    header = [f'"__metadata__":{_as_json(dict(texts))}']
    starts: dict[tuple[str, Shape], str] = {}  # what the header says of a tensor apart from its name and its offset
    for name, tensor in tensors.items():
        if (about := starts.get(alike := (tensor.dtype, tensor.shape))) is None:
            shape = ",".join(map(str, _header_shape(name, tensor)))
            about = starts[alike] = f'{{"dtype":"{_NAMES[tensor.dtype]}","shape":[{shape}],"data_offsets":['
        start = offsets[name]
        header.append(f"{_text_as_json(name)}:{about}{start},{start + tensor.source.nbytes}]}}")
    try:
        text = f"{{{','.join(header)}}}".encode()
    except UnicodeEncodeError:
        raise RequestError("a name in it is no valid text, which safetensors asks for", formats.instead()) from None
    del header
    runs = _runs(parts)
    start = _start(8 + len(text), runs, body)
    text += b" " * (start - 8 - len(text))
    found = [(start + offset, source) for offset, source in runs]
    return HeaderLayout(_LENGTH.pack(len(text)) + text, found, start + body)


_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
#: What that makes of a text.
_text_as_json = json.encoder.encode_basestring


def _require_names(tensors: Mapping[str, PlannedTensor]) -> None:
    """Raise RequestError for a tensor whose name or dtype the format does not have."""
    unknown = {tensor.dtype for tensor in tensors.values()} - _NAMES.keys()
    for name, tensor in tensors.items() if unknown or "__metadata__" in tensors else ():
        if name == "__metadata__":
            raise RequestError(
                f"safetensors cannot store a tensor named {name}, because that name is reserved for texts",
                formats.instead(),
            )
        if tensor.dtype in unknown:
            raise RequestError(f"{name} is {tensor.dtype}, which safetensors has no name for", formats.instead())


def _in_order(tensors: Mapping[str, PlannedTensor]) -> list[str]:
    """Return the names of tensors in the order of their bytes.

    The widest dtypes come first. Of one width, copied tensors keep the order of their files, and new ones follow them.
    A tensor that is made of others counts as copied from where the first of them is: taking tensors apart and joining
    them again gives the same file.
    """
    files: dict[Path, int] = {}
    by_width: dict[int, list[tuple[int, int, int]]] = {}
    last = None
    for index, tensor in enumerate(tensors.values()):
        source = tensor.source.begins_at if isinstance(tensor.source, Rearranged) else tensor.source
        if isinstance(source, Span):
            if source.path is not last:  # most tensors are in the file of the one before them
                last, file = source.path, files.setdefault(source.path, len(files))
            key = (file, source.offset, index)
        else:
            key = (_AFTER_FILES, index, index)
        by_width.setdefault(ITEM_BYTES[tensor.dtype], []).append(key)
    names = list(tensors)
    return [names[index] for width in sorted(by_width, reverse=True) for _, _, index in sorted(by_width[width])]


#: In the place of the number of a file: a tensor that is not copied from one.
_AFTER_FILES = 1 << 60


def _runs(parts: Iterable[tuple[int, Source]]) -> list[tuple[int, Source]]:
    """Join spans that are adjacent both here and in their source file."""
    found: list[tuple[int, Source]] = []
    first: Span | None = None  # the first span of the last run
    start = nbytes = 0  # where that run starts, and its bytes so far

    def end_run() -> None:
        if first is not None and nbytes > first.nbytes:
            found[-1] = (start, Span(first.path, first.offset, nbytes, first.identity))

    for place, source in parts:
        if not isinstance(source, Span):
            end_run()
            first = None
        elif (
            first is not None
            and (start + nbytes, first.offset + nbytes) == (place, source.offset)
            and (first.path, first.identity) == (source.path, source.identity)
        ):
            nbytes += source.nbytes
            continue
        else:
            end_run()
            first, start, nbytes = source, place, source.nbytes
        found.append((place, source))
    end_run()
    return found


def _start(at_least: int, runs: Sequence[tuple[int, Source]], body: int) -> int:
    """Return where the tensors start: at an offset that lets the largest run be copied fast, else aligned."""
    spans = [(source.nbytes, -place, source) for place, source in runs if isinstance(source, Span)]
    if spans:
        nbytes, place, source = max(spans, key=lambda span: span[:2])
        if nbytes >= LARGE and (source.offset + place) % 8 == 0:
            return at_least + (source.offset + place - at_least) % PAGE
    return at_least + -at_least % (PAGE if body >= _ALIGNED_FROM else 8)


def most_header_bytes(name: str, tensor: PlannedTensor) -> int:
    """A bound of what the header says of a tensor: its name, each character escaped, and everything around that."""
    return 6 * len(name) + 20 * len(tensor.shape) + 140


def _header_shape(name: str, tensor: PlannedTensor) -> list[int]:
    """Return the shape in elements. `float4_e2m1fn_x2` has two of them in each element of torch."""
    if tensor.dtype != PAIRS:
        return list(tensor.shape)
    if not tensor.shape:
        raise RequestError(f"{name} is {PAIRS} without a dimension, which safetensors cannot hold", formats.instead())
    return [*tensor.shape[:-1], tensor.shape[-1] * 2]


def verify(plan: Plan, path: Path) -> None:
    """Check the file with the reader of the safetensors library."""
    if read_back(path) != set(plan.first_names.values()):
        raise SystemFailureError("what was read back is not what was written; nothing was changed")


def read_back(path: Path) -> set[str]:
    """Return the names of a file's tensors, as the reader of the safetensors library finds them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as reader:
            return set(reader.keys())
    except SafetensorError as error:
        raise SystemFailureError(f"safetensors does not accept what was written: {error}") from None

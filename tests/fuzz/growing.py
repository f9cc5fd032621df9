"""Inputs for readers that have to agree: valid files of each format with changes, and pickles grown from a grammar.

A pickle is changed token by token (an opcode with its argument), so that most inputs are still pickles; a grown one is
made of calls that torch knows, with arguments that are nearly right.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import tarfile
import warnings
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from tests import hostile
from tests.fuzz.mutations import EDGES, mutated

Made = Callable[[random.Random], bytes]
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PROTOCOL = b"\x80\x02M\xe9\x03."
_SYSTEM = b"\x80\x02}q\x00(X\x0d\x00\x00\x00little_endianq\x01\x88u."


# --- containers ----------------------------------------------------------------------------------------------------


def archive(records: Sequence[tuple[str, bytes]]) -> bytes:
    """A zip archive of stored records: what `zipfile` makes, ten times as fast."""
    out, directory = bytearray(), bytearray()
    for title, data in records:
        name = title.encode("utf-8", "surrogatepass")
        fields = struct.pack("<2H2H3L2H", 0, 0, 0, 0x21, zlib.crc32(data), len(data), len(data), len(name), 0)
        directory += (
            b"PK\x01\x02" + struct.pack("<2H", 20, 20) + fields + bytes(10) + struct.pack("<L", len(out)) + name
        )
        out += b"PK\x03\x04" + struct.pack("<H", 20) + fields + name + data
    count = len(records)
    return bytes(
        out + directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(out), 0)
    )


def packed(pickled: bytes, storages: Mapping[str, bytes]) -> bytes:
    """What `torch.save` packs around a pickle."""
    records = [("a/data.pkl", pickled), ("a/byteorder", b"little"), ("a/version", b"3\n")]
    return archive([*records, *((f"a/data/{key}", data) for key, data in storages.items())])


def _unpacked(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The pickle and the storages of what `torch.save` wrote."""
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as found:
        read = {title.partition("/")[2]: found.read(title) for title in found.namelist()}
    return read["data.pkl"], {title[5:]: data for title, data in read.items() if title.startswith("data/")}


# --- valid files ---------------------------------------------------------------------------------------------------


def _values() -> list[Any]:
    """What people save, and what torch alone knows how to."""
    base = torch.arange(12.0).reshape(3, 4)
    shared = torch.arange(6, dtype=torch.int16)
    noted = torch.ones(2)
    noted.__dict__["note"] = "x"
    parameter = torch.nn.Parameter(torch.ones(2))
    noted_parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    noted_parameter.__dict__["note"] = torch.ones(1)
    state = OrderedDict(weight=base, bias=base[1], view=base.t(), half=base.half(), empty=torch.zeros(0, 3))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.5, 3, torch.qint8)
    channels = torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.5, 1.0]), torch.tensor([0, 1]), 0, torch.quint8
    )
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    return [
        state,
        {"a": shared, "b": shared[2:], "c": shared[::2], "flag": torch.tensor(True), "e": torch.tensor(3.5)},
        {"model": {"w": base, "n": 3}, "optimizer": {"state": {0: {"exp_avg": base}}, "lr": 0.1}, "epoch": 7},
        {"p": parameter, "q": noted_parameter, "n": noted, "f": torch.nn.Parameter(base, requires_grad=False)},
        {"conj": complex_.conj(), "neg": torch._neg_view(complex_), "plain": complex_},
        {"imag": complex_.conj().imag, "neg": torch._neg_view(base), "c32": complex_.to(torch.complex32).conj()},
        {"sparse": base.to_sparse(), "csr": torch.eye(3).to_sparse_csr(), "w": base},
        {"q": quantized, "c": channels, "w": torch.ones(1)},
        {"meta": torch.empty(2, 3, device="meta"), "w": torch.ones(2)},
        {name: torch.ones(4).to(getattr(torch, name)) for name in ("float8_e5m2", "uint16", "uint64")},
        {
            "w": base,
            "x._extra_state": {"t": base[0], "s": {1}, "c": Counter("ab")},
            "b": b"\xff",
            "d": torch.device("cpu"),
        },
        {"w": base, "size": torch.Size([2]), "dtype": torch.float16, "z": 1 + 2j, "l": [1, (2, 3)], "big": 2**70},
    ]


@cache
def _saved() -> tuple[tuple[bytes, dict[str, bytes]], ...]:
    """Pickles and storages of archives, in each protocol."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in _values():
            for protocol in (2, 2, 3, 4, 5):
                out = io.BytesIO()
                torch.save(value, out, pickle_protocol=protocol)
                found.append(_unpacked(out.getvalue()))
    return tuple(found)


@cache
def _saved_before() -> tuple[bytes, ...]:
    """Files of the format before 1.6, in each protocol."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in _values():
            for protocol in (2, 2, 3, 4):
                out = io.BytesIO()
                torch.save(value, out, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
                found.append(out.getvalue())
    return tuple(found)


def _pickles_of(data: bytes) -> tuple[list[bytes], bytes]:
    """The five pickles of an old file, and the storages behind them."""
    stream, found = io.BytesIO(data), []
    for _ in range(5):
        start = stream.tell()
        for _opcode, _arg, _position in pickletools.genops(stream):
            pass
        found.append(data[start : stream.tell()])
    return found, data[stream.tell() :]


# --- tokens --------------------------------------------------------------------------------------------------------

Tokens = list[bytes]


def tokens_of(pickled: bytes) -> Tokens:
    """A pickle cut before each opcode."""
    places = [position for _opcode, _arg, position in pickletools.genops(pickled) if position is not None]
    return [pickled[start:end] for start, end in zip(places, [*places[1:], len(pickled)], strict=True)]


_TEXTS = [
    "0", "1", "2", "7", "cpu", "meta", "cuda:0", "cpu:0", "storage", "module", "data", "conj", "neg", "note",
    "requires_grad", "real", "weight", "w", "_metadata", "", "é", "0\0x", "torch.strided", "torch.sparse_coo", "latin1",
    "grad", "__class__",
]  # fmt: skip


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


@cache
def _names() -> tuple[bytes, ...]:
    """Every name that torch allows, some that it does not, and those of Python 2."""
    allowed = sorted(torch._weights_only_unpickler._get_allowed_globals())
    others = [
        "__builtin__.set",
        "__builtin__.complex",
        "UserDict.OrderedDict",
        "os.system",
        "builtins.getattr",
        "torch.nn.Linear",
    ]
    return tuple(hostile.name(dotted) for dotted in (*allowed, *others))


_COMMON = [
    hostile.name(dotted)
    for dotted in (
        "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.nn.parameter.Parameter",
        "torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor", "torch.Tensor", "torch.FloatTensor",
        "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_nested_tensor", "torch.Size",
        "collections.OrderedDict", "collections.Counter", "torch.FloatStorage", "torch.storage.UntypedStorage",
        "torch.float32", "torch.int16", "torch.complex64", "torch.device", "builtins.set",
    )
]  # fmt: skip
_SINGLE = [bytes([code]) for code in b"()}]tRb\x81suaeN\x88\x89\x85\x86\x87012Q.\x8f\x90ld\x94"]
_SINGLE += [b"\x80\x02", b"\x80\x04"]


def _token(draw: random.Random, pool: Sequence[bytes]) -> bytes:
    """Any token: one of this file's, of all files', or a new one."""
    match draw.randrange(10):
        case 0:
            return draw.choice(_names())
        case 1 | 2:
            return draw.choice(_COMMON)
        case 3 | 4:
            return draw.choice(_SINGLE)
        case 5:
            return text(draw.choice(_TEXTS))
        case 6:
            return number(draw.choice((0, 1, 2, 3, 4, -1, *EDGES)))
        case 7:
            return draw.choice((b"h", b"q")) + bytes([draw.randrange(24)])
        case 8:
            data = draw.choice(_TEXTS).encode()
            return draw.choice(
                (
                    b"U" + bytes([len(data)]) + data,
                    b"T" + struct.pack("<i", len(data)) + data,
                    b"I%d\n" % draw.randrange(9),
                    b"\x8c" + bytes([len(data)]) + data,
                )
            )
        case _:
            return draw.choice(pool)  # fmt: skip


def changed(tokens: Tokens, draw: random.Random) -> bytes:
    """The pickle with one to four of its tokens others."""
    made = list(tokens)
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        at = draw.randrange(len(made))
        match draw.randrange(9):
            case 0:
                del made[at]
            case 1:
                made.insert(at, made[at])
            case 2:
                other = draw.randrange(len(made))
                made[at], made[other] = made[other], made[at]
            case 3 | 4:
                made[at] = _alike(made[at], draw) or _token(draw, tokens)
            case 5:
                made.insert(at, _token(draw, tokens))
            case 6:
                made[at:at] = tokens_of_value(draw)
            case 7:
                start = draw.randrange(len(made))
                made[at:at] = made[start : start + draw.choice((1, 2, 5, 20))]
            case _:
                made[at:at] = draw.choice(_STATES)(draw)
        if not made:
            break
    return b"".join(made)


def _alike(token: bytes, draw: random.Random) -> bytes | None:
    """Another argument for the same kind of token."""
    code = token[:1]
    if code == b"c":
        return draw.choice(draw.choice((_COMMON, _names())))
    if code in (b"K", b"M", b"J", b"\x8a"):
        return number(draw.choice((0, 1, 2, 3, 4, 5, 6, 8, 12, -1, *EDGES)))
    if code in (b"X", b"\x8c", b"U"):
        return text(draw.choice(_TEXTS))
    if code in (b"\x88", b"\x89", b"N"):
        return draw.choice((b"\x88", b"\x89", b"N", b"K\x01"))
    if code in (b"h", b"j"):
        return b"h" + bytes([draw.randrange(40)])
    return None


def tokens_of_value(draw: random.Random) -> Tokens:
    return [grown(draw, 3)]


_HOOKS = hostile.name("collections.OrderedDict") + b")R"
_STATES: Sequence[Callable[[random.Random], Tokens]] = [
    lambda draw: [grown(draw, 2), b"b"],
    lambda draw: [b"}", text(draw.choice(_TEXTS)), grown(draw, 1), b"s", b"b"],
    lambda draw: [text(draw.choice(_TEXTS)), grown(draw, 2), b"s"],
    lambda draw: [grown(draw, 2), b"a"],
    lambda draw: [b"(", draw.choice((b"\x88", b"\x89")), b"\x89", _HOOKS, b"t", b"b"],
    lambda draw: [b"(", _storage(draw), b"K\x00", b"K\x01\x85", b"K\x01\x85", b"t", b"b"],
]


# --- a grammar -----------------------------------------------------------------------------------------------------

#: Storages of the keys 0 to 3, all of 32 bytes, and the class of each where it is what it should be.
STORAGES = {key: bytes((int(key) * 31 + n * 7) % 100 for n in range(32)) for key in "0123"}
_CLASSES = {
    "0": ("FloatStorage", 8),
    "1": ("LongStorage", 4),
    "2": ("ComplexFloatStorage", 4),
    "3": ("UntypedStorage", 32),
}


def _maybe(draw: random.Random, usual: bytes, *others: bytes, one_in: int = 12) -> bytes:
    return draw.choice(others) if draw.randrange(one_in) == 0 else usual


def _storage(draw: random.Random, key: str | None = None, view: bool | None = None) -> bytes:
    """A persistent id. `view` is None for archives, and says whether an old file has a part of a storage."""
    key = key or draw.choice("000112233")
    kind, count = _CLASSES[key]
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    named = _maybe(
        draw, hostile.name(f"{module}.{kind}"), *_COMMON[17:19], hostile.name("torch.ByteStorage"), one_in=25
    )
    size = _maybe(draw, number(count), number(1), number(count + 1), number(count * 4), number(0), one_in=25)
    place = _maybe(draw, text("cpu"), text("meta"), text("cuda:0"), text("x"), b"N", b"U\x03cpu", one_in=20)
    label = _maybe(draw, text(key), text("0\0x"), number(int(key)), b"U\x01" + key.encode(), one_in=25)
    what = b"(" + text("storage") + named + label + place + size
    if view is None:
        return what + b"tQ"
    part = b"(" + text(draw.choice("789")) + number(draw.randrange(3)) + number(draw.randrange(1, 4)) + b"t"
    return what + (part if view else b"N") + b"tQ"


_PLACES: list[Callable[[random.Random], bytes]] = [_storage]


def _any_storage(draw: random.Random) -> bytes:
    return _PLACES[-1](draw)


def _sizes(values: Sequence[int], draw: random.Random) -> bytes:
    body = b"(" + b"".join(map(number, values))
    wrapped = hostile.name("torch.Size") + body + b"t\x85R"
    return _maybe(draw, body + b"t", wrapped, b"]" + body + b"e", body + b"l", b")", one_in=10)


def _shape(draw: random.Random) -> tuple[bytes, bytes]:
    shape, stride = draw.choice((
        ((2,), (1,)), ((2,), (2,)), ((), ()), ((1, 2), (2, 1)), ((2, 2), (1, 2)), ((0, 3), (3, 1)), ((3,), (0,)),
        ((4,), (1,)), ((1,), (99,)), ((2,), (-1,)), ((2**40,), (0,)), ((-1,), (1,)), ((2, 1), (1, 0)), ((16,), (1,)),
    ))  # fmt: skip
    return _sizes(shape, draw), _sizes(stride, draw)


def _grad(draw: random.Random) -> bytes:
    return _maybe(draw, draw.choice((b"\x89", b"\x89", b"\x88")), b"N", b"K\x01", b"K\x00", one_in=20)


def _marks(draw: random.Random) -> bytes:
    value = draw.choice((b"\x88", b"\x89", b"K\x01", b"N", text("x")))
    return b"}" + text(draw.choice(("conj", "neg", "conj", "x"))) + value + b"s"


_V3_DTYPES = (
    *("float32", "int16", "complex64", "uint8", "float8_e5m2", "uint16", "bool", "complex32", "float64"),
    *("qint8", "bits8", "uint4"),
)


def _tensor(draw: random.Random) -> bytes:
    shape, stride = _shape(draw)
    view = _any_storage(draw) + number(draw.choice((0, 0, 0, 1, 2, 3))) + shape + stride
    match draw.randrange(8):
        case 0:
            return hostile.name("torch._utils._rebuild_tensor") + b"(" + view + b"tR"
        case 1 | 2:
            dtype = draw.choice(_V3_DTYPES)
            more = _marks(draw) if draw.randrange(5) == 0 else b""
            made = view + _grad(draw) + _HOOKS + hostile.name(f"torch.{dtype}") + more
            return hostile.name("torch._utils._rebuild_tensor_v3") + b"(" + made + b"tR"
    more = _marks(draw) if draw.randrange(5) == 0 else _maybe(draw, b"", b"N", b"NN", b"}", one_in=20)
    hooks = _maybe(draw, _HOOKS, b"N", b"}", one_in=15)
    return hostile.name("torch._utils._rebuild_tensor_v2") + b"(" + view + _grad(draw) + hooks + more + b"tR"


def _attributes(draw: random.Random, depth: int) -> bytes:
    name = text(
        draw.choice(("note", "note", "scale", "data", "requires_grad", "real", "grad", "__class__", "shape", "T"))
    )
    state = b"}" + name + grown(draw, depth - 1) + b"s"
    return _maybe(draw, state, b"N", b"}", b"(" + state + b"}t", b"(N" + state + b"t", b"(NN" + state + b"t", one_in=3)


def _call(draw: random.Random, depth: int) -> bytes:
    """A tensor made around another."""
    inner = _tensor(draw) if draw.randrange(4) else grown(draw, depth - 1)
    name = hostile.name
    match draw.randrange(12):
        case 0:
            return name("torch._utils._rebuild_parameter") + b"(" + inner + _grad(draw) + _HOOKS + b"tR"
        case 1:
            state = _attributes(draw, depth)
            return (
                name("torch._utils._rebuild_parameter_with_state") + b"(" + inner + _grad(draw) + _HOOKS + state + b"tR"
            )
        case 2:
            flag = draw.choice((b"", b"", b"\x88", b"\x89", b"K\x01"))
            return name("torch.nn.parameter.Parameter") + b"(" + inner + flag + draw.choice((b"tR", b"t\x81"))
        case 3:
            flags = b"(" + draw.choice((b"\x88", b"\x89", b"N")) + b"\x89" + _HOOKS + b"tb"
            return name("torch.nn.parameter.Parameter") + inner + b"\x85R" + flags
        case 4:
            function, _, rest = _tensor(draw).partition(b"(")
            kind = draw.choice(("torch.Tensor", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.FloatTensor"))
            state = _attributes(draw, depth)
            made = function + name(kind) + b"(" + rest.removesuffix(b"R") + state
            return name("torch._tensor._rebuild_from_type_v2") + b"(" + made + b"tR"
        case 5:
            dtype = name(draw.choice(("torch.float32", "torch.float32", "torch.int64", "torch.float64")))
            place = draw.choice(
                (text("cpu"), text("cpu"), text("meta"), text("xla:0"), name("torch.device") + text("meta") + b"\x85R")
            )
            made = inner + dtype + place + _grad(draw)
            return name("torch._utils._rebuild_device_tensor_from_cpu_tensor") + b"(" + made + b"tR"
        case 6:
            shape, stride = _shape(draw)
            made = name(draw.choice(("torch.float32", "torch.int8", "torch.Tensor"))) + shape + stride + _grad(draw)
            return name("torch._utils._rebuild_meta_tensor_no_storage") + b"(" + made + b"tR"
        case 7:
            layout = name("torch.serialization._get_layout") + text("torch.sparse_coo") + b"\x85R"
            indices = (
                name("torch._utils._rebuild_tensor_v2")
                + b"("
                + _storage_of("1")
                + b"K\x00(K\x01K\x02t(K\x02K\x01t\x89"
                + _HOOKS
                + b"tR"
            )
            size = _sizes(draw.choice(((128,), (100000,), (2**33,), (4, 4))), draw)
            coalesced = draw.choice((b"", b"\x88", b"\x89", b"N", b"K\x01"))
            made = b"(" + indices + inner + size + coalesced + b"t"
            return name("torch._utils._rebuild_sparse_tensor") + b"(" + layout + made + b"tR"
        case 8:
            scheme = (
                b"("
                + name("torch.per_tensor_affine")
                + draw.choice((b"G?\xe0\0\0\0\0\0\0", b"K\x02"))
                + number(draw.randrange(5))
                + b"t"
            )
            shape, stride = _shape(draw)
            made = _storage_of("4") + number(draw.randrange(3)) + shape + stride + scheme + b"\x89" + _HOOKS
            return name("torch._utils._rebuild_qtensor") + b"(" + made + b"tR"
        case 9:
            return name(draw.choice(("torch.Tensor", "torch.FloatTensor", "torch.LongTensor"))) + draw.choice(
                (b")R", b")\x81", b"](K\x01K\x02e\x85R", inner + b"\x85R")
            )
    return inner  # fmt: skip


def _storage_of(key: str) -> bytes:
    kind, count = {**_CLASSES, "4": ("QInt8Storage", 32)}[key]
    view = b"" if _PLACES[-1] is _storage else b"N"
    place = hostile.name(f"torch.{kind}") + text(key) + text("cpu") + number(count) + view
    return b"(" + text("storage") + place + b"tQ"


def grown(draw: random.Random, depth: int = 4) -> bytes:
    """A value, with opcodes around it that put it into the memo or take another from there."""
    made = _value(draw, depth)
    match draw.randrange(24):
        case 0:
            return made + b"q" + bytes([draw.randrange(8)])
        case 1:
            return made + b"".join(draw.choice(_STATES)(draw)) if depth > 0 else made
        case 2:
            return made + b"2" + draw.choice((b"0", b"\x86", b"00", b""))
        case 3:
            return b"(" + made + draw.choice((b"1", b"t0", b"l0", b"0")) + _value(draw, depth - 1)
    return made


def _value(draw: random.Random, depth: int) -> bytes:
    choice = draw.randrange(20) if depth > 0 else draw.randrange(9, 17)
    match choice:
        case 0 | 1 | 2 | 3:
            return _call(draw, depth)
        case 4:
            return _dict(draw, depth, draw.randrange(4))
        case 5:
            return b"]" + b"".join(grown(draw, depth - 1) + b"a" for _ in range(draw.randrange(3)))
        case 6:
            return grown(draw, depth - 1) + grown(draw, depth - 1) + b"\x86"
        case 7:
            made = grown(draw, depth - 1)
            return hostile.name("collections.Counter") + b")R" + text(draw.choice(_TEXTS)) + made + b"s"
        case 8:
            return b"h" + bytes([draw.randrange(8)])
        case 9:
            return b"N"
        case 10:
            return number(draw.choice((0, 1, 2, 3, 255, -1, 2**40)))
        case 11 | 12:
            return text(draw.choice(_TEXTS))
        case 13:
            return draw.choice((b"\x88", b"\x89", b"G?\xf0\0\0\0\0\0\0", b")", b"}", b"]", b"U\x02\xc3\xa9", b"\x8f"))
        case 14:
            return draw.choice(_COMMON)
        case 15:
            return hostile.name("torch.Size") + b"(K\x02t\x85R"
    return _tensor(draw)


def _dict(draw: random.Random, depth: int, count: int) -> bytes:
    keys = [text(draw.choice(_TEXTS)) for _ in range(count)]
    items = [(_maybe(draw, key, b"U\x02\xc3\xa9", b"K\x01", b"N", one_in=30), grown(draw, depth - 1)) for key in keys]
    ordered = hostile.name("collections.OrderedDict")
    match draw.randrange(8):
        case 0:
            pairs = b"".join(key + value + b"\x86a" for key, value in items)
            return ordered + b"]" + pairs + b"\x85R"
        case 1:
            state = b"}" + text("_metadata") + grown(draw, depth - 1) + b"sb"
            return ordered + draw.choice((b")R", b")\x81")) + _items(items) + state
        case 2:
            return ordered + draw.choice((b")R", b")\x81", b"}\x85R", b"]\x85\x81")) + _items(items)
        case 3:
            return b"(" + b"".join(key + value for key, value in items) + b"d"
    return b"}" + _items(items)


def _items(items: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"(" + b"".join(key + value for key, value in items) + b"u"


def grown_pickle(draw: random.Random) -> bytes:
    """A state dict, or one in a training checkpoint, most of it tensors."""
    if draw.randrange(6) == 0:
        inner = _dict(draw, 4, draw.randrange(1, 4))
        body = b"}(" + text(draw.choice(("model", "state_dict", "net", "x"))) + inner + text("epoch") + b"K\x07u"
    else:
        body = _dict(draw, 4, draw.randrange(1, 4))
    # Without a tensor it would be no state dict, and nothing to compare.
    sure = _any_storage(random.Random(1)) + b"K\x00K\x02\x85K\x01\x85\x89" + _HOOKS
    sure = text("sure") + hostile.name("torch._utils._rebuild_tensor_v2") + b"(" + sure + b"tRs"
    made = b"\x80\x02" + body + (sure if draw.randrange(10) else b"") + b"."
    if draw.randrange(4) == 0:
        try:
            return changed(tokens_of(made), draw)
        except ValueError:
            return made
    return made


# --- what makes inputs ---------------------------------------------------------------------------------------------


def archives_of_grown_pickles() -> Made:
    storages = STORAGES | {"4": bytes(range(32))}
    return lambda draw: packed(grown_pickle(draw), storages)


def archives_of_tokens() -> Made:
    seeds = [(tokens_of(pickled), storages) for pickled, storages in _saved()]

    def made(draw: random.Random) -> bytes:
        tokens, storages = draw.choice(seeds)
        return packed(changed(tokens, draw), STORAGES | storages)

    return made


_ZIP = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"a/data/0", b"a/BYTEORDER", b"\x10\0\0\0", b"a/data/", b"\0"]

_MORE_RECORDS = (
    *("a/data/0", "A/data/0", "a/DATA/0", "a/data/0\0", "a/BYTEORDER", "a/data/", "b/data/0", "a/.data/x", "a/é"),
    *("a/constants.pkl", "a/data/00", "a/version", "a/data.pkl/", "a//data/0", "./a/data/0"),
)


def archives_by_bytes() -> Made:
    """Bits and bytes, most of them in the headers of the archive; and records that stand twice."""
    seeds = [packed(pickled, storages) for pickled, storages in _saved()[::5]]
    parts = [(pickled, storages) for pickled, storages in _saved()[::5]]

    def made(draw: random.Random) -> bytes:
        if draw.randrange(4) == 0:
            pickled, storages = draw.choice(parts)
            records = [
                ("a/data.pkl", pickled),
                ("a/byteorder", draw.choice((b"little", b"big", b""))),
                ("a/version", b"3\n"),
            ]
            records += [(f"a/data/{key}", data) for key, data in storages.items()]
            more = draw.choice(_MORE_RECORDS), draw.choice((b"", b"x", bytes(48)))
            records.insert(draw.randrange(len(records) + 1), more)
            return archive(records)
        data = draw.choice(seeds)
        if draw.randrange(2):
            return mutated([data], _ZIP, draw)
        changed_ = bytearray(data)
        places = [at for at in range(len(data) - 4) if data[at : at + 2] == b"PK"]
        at = draw.choice(places) + draw.randrange(46)
        if at < len(changed_):
            changed_[at] ^= draw.choice((1, 2, 8, 0x10, 0x20, 0x80, 0xFF))
        return bytes(changed_)

    return made


def _old(pickles: Sequence[bytes], storages: bytes) -> bytes:
    return b"".join(pickles) + storages


def legacies_grown() -> Made:
    names = [*STORAGES, "4"]
    every = STORAGES | {"4": bytes(range(32))}

    def made(draw: random.Random) -> bytes:
        _PLACES.append(lambda d: _storage(d, view=d.randrange(6) == 0))
        try:
            pickled = grown_pickle(draw)
        finally:
            _PLACES.pop()
        used = [key for key in names if text(key) in pickled]
        if draw.randrange(15) == 0:
            draw.shuffle(used)
            used = used[draw.randrange(2) :]
        keys = b"\x80\x02](" + b"".join(map(text, used)) + b"e."
        sizes = {key: {**_CLASSES, "4": ("", 32)}[key][1] for key in used}
        storages = b"".join(struct.pack("<Q", sizes[key]) + every[key] for key in used)
        return _old((_MAGIC, _PROTOCOL, _SYSTEM, pickled, keys), storages)

    return made


def legacies_of_tokens() -> Made:
    seeds = []
    for data in _saved_before():
        pickles, storages = _pickles_of(data)
        seeds.append(([tokens_of(pickled) for pickled in pickles], storages))

    def made(draw: random.Random) -> bytes:
        pickles, storages = draw.choice(seeds)
        which = draw.choice((1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4))
        changed_ = [changed(p, draw) if n == which else b"".join(p) for n, p in enumerate(pickles)]
        if draw.randrange(10) == 0:
            changed_[4] = changed(pickles[4], draw)
        return _old(changed_, storages)

    return made


def legacies_by_bytes() -> Made:
    seeds = _saved_before()[::4]
    words = [struct.pack("<Q", count) for count in (0, 1, 2, 4, 2**63)] + [b"PK\x05\x06" + bytes(18)]
    return lambda draw: mutated(seeds, words, draw)


def tars() -> Made:
    """Tar archives, and old files and archives whose first block is the header of a tar as well."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for title in ("storages", "tensors", "pickle"):
            data = b"\x80\x02K\x00." if title != "pickle" else b"\x80\x02}."
            info = tarfile.TarInfo(title)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = out.getvalue()
    others = [*_saved_before()[::4], *(packed(*parts) for parts in _saved()[::10])]

    def made(draw: random.Random) -> bytes:
        match draw.randrange(4):
            case 0:
                return mutated([whole], [b"ustar\x0000", b"\x80\x02", _MAGIC], draw)
            case 1:
                block = bytearray(draw.choice(others)[:100].ljust(100, b"\0") + whole[100:])
            case _:
                block = bytearray(draw.choice(others))
        block[148:156] = b" " * 8
        if draw.randrange(3):
            block[257:265] = draw.choice((b"ustar\x0000", b"ustar  \0", bytes(8)))
        total = sum(block[:512]) + draw.choice((0, 0, 0, 1))
        block[148:156] = draw.choice((b"%06o\0 ", b"%07o\0", b" %05o\0 ")) % total
        return bytes(block)

    return made


# --- safetensors ---------------------------------------------------------------------------------------------------

_DTYPES = (
    *("F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "U16", "U32", "U64", "F8_E4M3", "F8_E5M2", "C64"),
    *("F8_E8M0", "F4", "X"),
)
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "I64": 64, "U16": 16, "U32": 32, "U64": 64, "C64": 64, "F4": 4}


def safetensors_by_fields() -> Made:
    """Headers whose fields are nearly right: other numbers, types, orders, names twice."""

    def made(draw: random.Random) -> bytes:
        entries: list[tuple[str, Any]] = []
        at = 0
        for _ in range(draw.randrange(4)):
            dtype, shape = draw.choice(_DTYPES), draw.choice(([2], [2, 3], [], [0], [1, 2, 2], [4, 1]))
            count = 1
            for size in shape:
                count *= size
            end = at + count * _BITS.get(dtype, 8) // 8
            info: dict[str, Any] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            at = end
            if draw.randrange(8) == 0:
                field = draw.choice((*info, "more"))
                info[field] = draw.choice(
                    (None, 1, -1, 2.0, True, [], [2.0], [True, 2], "F32", [at, at], [0, 2**64], {})
                )
            if draw.randrange(40) == 0:
                info = list(info.values())  # type: ignore[assignment]
            entries.append((draw.choice(("a", "b", "c", "é", "", "__metadata_", "x.y", "\ud800")), info))
        if draw.randrange(3) == 0:
            entries.append(
                ("__metadata__", draw.choice(({}, {"format": "pt"}, None, [], 0, False, "", {"a": 1}, {"z": "a"})))
            )
        draw.shuffle(entries)
        body = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in entries)
        header = ("{" + body + "}" + draw.choice(("", "", "  ", "\n", ",", "x", "\0"))).encode()
        data = bytes(n * 37 % 2 if n % 3 else 1 for n in range(at + draw.choice((0, 0, 0, 0, 1, 8))))
        length = len(header) + draw.choice((0, 0, 0, 0, 0, 0, 1, -1))
        return struct.pack("<Q", max(length, 0)) + header + data

    return made


def safetensors_by_bytes() -> Made:
    from safetensors.torch import save

    seeds = [
        save({"a": torch.ones(2, 2), "b": torch.ones(2, dtype=torch.bfloat16)}, {"format": "pt"}),
        save({"a": torch.ones(3, dtype=torch.uint8), "c": torch.ones(0), "s": torch.tensor(1)}),
        save({}),
    ]
    words = [b"null", b"true", b"-0", b"1e0", b"NaN", b'"\\ud800"', b'"a"', b'"F16"', b'"U8"', b"[0,0]", b"\xff"]
    words += [bytes([mark]) for mark in b'{}[]":, ']
    return lambda draw: mutated(seeds, words, draw)

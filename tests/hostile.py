"""Malicious and malformed files, each as bytes with the exit code that showing it must give.

They are made byte by byte, without torch, so that each file is exactly what its author meant. Payloads would create a
file called `MARKER` if they ran, and do no other harm.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

MARKER = "it-ran"
COMMAND = f"touch {MARKER}"
PYTHON = f"open({MARKER!r}, 'w')"


class Hostile(NamedTuple):
    """A file's name and bytes, the exit code of showing it, and what the message must contain.

    `file` is what it is called on disk, and `beside` are other files in its folder, by their names. `is_only_a_tree`
    says that only the modules in its names are too many: a look at its tensors shows them, at no cost.
    """

    name: str
    data: bytes
    code: int
    says: str = ""
    file: str = "m.pth"
    beside: Mapping[str, bytes] = {}
    is_only_a_tree: bool = False

    def code_of(self, command: str) -> int:
        """Return the exit code of a command that shows it."""
        return 0 if self.is_only_a_tree and command.startswith("params") else self.code


# --- pickles by hand -----------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    shape: tuple[int, ...] = (2,),
    stride: tuple[int, ...] = (1,),
    *,
    key: bytes = text("0"),
    offset: int = 0,
    storage: str = "torch.FloatStorage",
    count: int = 2,
    rebuild: str = "torch._utils._rebuild_tensor_v2",
) -> bytes:
    """Return the pickle of a tensor as `torch.save` writes it; each argument changes a part of it."""
    persistent = b"(" + text("storage") + name(storage) + key + text("cpu") + number(count) + b"tQ"
    hooks = name("collections.OrderedDict") + b")R"
    return name(rebuild) + b"(" + persistent + number(offset) + sizes(*shape) + sizes(*stride) + b"\x89" + hooks + b"tR"


def quantized(shape: tuple[int, ...], scheme: bytes | None = None) -> bytes:
    """Return the pickle of a quantized tensor with one byte for each element."""
    persistent = b"(" + text("storage") + name("torch.QInt8Storage") + text("0") + text("cpu") + number(8) + b"tQ"
    scheme = (
        b"(" + name("torch.per_tensor_affine") + b"G" + struct.pack(">d", 0.5) + b"K\x00t" if scheme is None else scheme
    )
    hooks = name("collections.OrderedDict") + b")R"
    view = b"K\x00" + sizes(*shape) + sizes(1)
    return name("torch._utils._rebuild_qtensor") + b"(" + persistent + view + scheme + b"\x89" + hooks + b"tR"


def sparse(shape: tuple[int, ...]) -> bytes:
    """Return the pickle of a sparse tensor whose indices and values are plain tensors."""
    layout = name("torch.serialization._get_layout") + b"(" + text("torch.sparse_coo") + b"tR"
    data = b"(" + tensor((2, 0), (1, 1)) + tensor((0,)) + name("torch.Size") + b"(" + sizes(*shape) + b"tR" + b"t"
    return name("torch._utils._rebuild_sparse_tensor") + b"(" + layout + data + b"tR"


def state_dict(*items: tuple[str, bytes]) -> bytes:
    body = b"".join(text(key) + value for key, value in items)
    return b"\x80\x02}(" + body + b"u."


GOOD = state_dict(("a.weight", tensor()))

#: What would run if a name were looked up or called.
PAYLOADS: Mapping[str, bytes] = {
    "os.system": name("os.system") + b"(" + text(COMMAND) + b"tR",
    "posix.system": name("posix.system") + b"(" + text(COMMAND) + b"tR",
    "subprocess": name("subprocess.getoutput") + b"(" + text(COMMAND) + b"tR",
    "eval": name("builtins.eval") + b"(" + text(PYTHON) + b"tR",
    "exec": name("builtins.exec") + b"(" + text(PYTHON) + b"tR",
    "exec of Python 2": name("__builtin__.exec") + b"(" + text(PYTHON) + b"tR",
    "open": name("builtins.open") + b"(" + text(MARKER) + text("w") + b"tR",
    "pathlib": name("pathlib.Path") + b"(" + text(MARKER) + b"tR",
    "runpy": name("runpy.run_path") + b"(" + text(MARKER) + b"tR",
    "import": name("builtins.__import__") + b"(" + text("antigravity") + b"tR",
    "getattr": name("builtins.getattr") + b"(" + name("os.path") + text("join") + b"tR",
    "a name with dots": name("torch.serialization.os.system") + b"(" + text(COMMAND) + b"tR",
    "a name of protocol 4": text("os") + text("system") + b"\x93(" + text(COMMAND) + b"tR",
    "a name like one of torch's": name("torch.storage._load_from_bytes") + b"(" + text("x") + b"tR",
    "torch.hub": name("torch.hub.load") + b"(" + text(".") + b"tR",
    "torch.load": name("torch.load") + b"(" + text(MARKER) + b"tR",
    "a new object": name("os.system") + text(COMMAND) + b"\x85\x81",
    "a new object with keywords": name("os.system") + text(COMMAND) + b"\x85}\x92",
    "a state": name("webbrowser.Mozilla") + b")R}" + text("name") + text(COMMAND) + b"sb",
    "a state of another object": name("builtins.list") + b")R" + name("os.environ") + b"b",
    "partial": name("functools.partial") + b"(" + name("os.system") + text(COMMAND) + b"tR",
    "map": name("builtins.map") + b"(" + name("os.system") + b"]" + text(COMMAND) + b"atR",
    "a reconstructor": name("copyreg._reconstructor") + b"(" + name("os.system") + name("builtins.object") + b"NtR",
    "numpy": name("numpy.testing._private.utils.runstring") + b"(" + text(PYTHON) + b"}tR",
    "a class of a file": name("nets.Net") + b")\x81}b",
    "a call of a call": name("builtins.getattr")
    + b"("
    + name("os.system")
    + text("__call__")
    + b"tR("
    + text(COMMAND)
    + b"tR",
}


# --- zip archives by hand ------------------------------------------------------------------------------------------


def archive(
    pickled: bytes = GOOD,
    records: Mapping[str, bytes] | None = None,
    *,
    prefix: str = "archive/",
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """Return an archive as `torch.save` writes it, made by `zipfile`, with eight bytes in storage 0."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as made:
        made.writestr(f"{prefix}data.pkl", pickled)
        made.writestr(f"{prefix}byteorder", b"little", zipfile.ZIP_STORED)
        for key, data in ({"data/0": bytes(8)} if records is None else records).items():
            made.writestr(f"{prefix}{key}", data)
        made.writestr(f"{prefix}version", b"3\n", zipfile.ZIP_STORED)
    return out.getvalue()


class Parts(NamedTuple):
    """An archive taken apart: its records, the entries of its directory, and its end."""

    records: bytes
    entries: list[bytes]
    end: bytes

    def joined(self, *, behind: bytes = b"", **changes: int) -> bytes:
        """Return the file again. Its end record fits its parts, except for the fields in `changes`."""
        directory = b"".join(self.entries)
        fields = {
            "here": len(self.entries),
            "count": len(self.entries),
            "length": len(directory),
            "offset": len(self.records),
        } | changes
        end = struct.pack(
            "<4s4H2LH",
            b"PK\x05\x06",
            fields.get("disk", 0),
            0,
            fields["here"],
            fields["count"],
            fields["length"],
            fields["offset"],
            fields.get("comment", 0),
        )
        return self.records + directory + end + behind


def parts(data: bytes) -> Parts:
    (length, offset) = struct.unpack("<2L", data[-10:-2])
    directory = data[offset : offset + length]
    entries = [b"PK\x01\x02" + entry for entry in directory.split(b"PK\x01\x02")[1:]]
    return Parts(data[:offset], entries, data[offset + length :])


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    made = bytearray(data)
    struct.pack_into(form, made, at, *values)
    return bytes(made)


def with_entry(number_: int, at: int, form: str, *values: int) -> bytes:
    """Return the good archive with one field of one directory entry changed."""
    taken = parts(archive())
    taken.entries[number_] = patched(taken.entries[number_], at, form, *values)
    return taken.joined()


def with_header(at: int, form: str, *values: int) -> bytes:
    """Return the good archive with one field of the local header of its record data/0 changed."""
    data = archive()
    header = data.index(b"archive/data/0") - 30
    return patched(data, header + at, form, *values)


def zip64(**changes: int) -> bytes:
    """Return the good archive with a zip64 end record, with the fields in `changes` changed."""
    taken = parts(archive())
    directory = b"".join(taken.entries)
    fields = {
        "size": 44,
        "here": len(taken.entries),
        "count": len(taken.entries),
        "length": len(directory),
        "offset": len(taken.records),
    } | changes
    at = len(taken.records) + len(directory)
    longer = struct.pack(
        "<4sQ2H2L4Q",
        b"PK\x06\x06",
        fields["size"],
        45,
        45,
        0,
        0,
        fields["here"],
        fields["count"],
        fields["length"],
        fields["offset"],
    )
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, fields.get("at", at), fields.get("disks", 1))
    short = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *[fields.get("short", 0xFFFF)] * 2, 2**32 - 1, 2**32 - 1, 0)
    return taken.records + directory + longer + locator + short


def zips() -> Iterator[Hostile]:
    good = archive()
    taken = parts(good)
    yield Hostile("good", good, 0)
    yield Hostile("good, with an end of the longer form", zip64(), 0)
    yield Hostile("a record twice", _with_record("archive/data/0"), 4, "twice")
    yield Hostile("a record twice but for capitals", _with_record("ARCHIVE/Data/0"), 4, "twice")
    yield Hostile("a pickle twice", _with_record("archive/data.pkl"), 4, "twice")
    yield Hostile("a second prefix", _with_record("other/data/0"), 4, "outside the folder")
    yield Hostile("a second pickle", _with_record("other/data.pkl"), 4, "2 files named data.pkl")
    yield Hostile("a record outside", _with_record("../../etc/passwd"), 4, "outside the folder")
    yield Hostile("no prefix", archive(prefix=""), 4, "one folder")
    yield Hostile("two folders", archive(prefix="a/b/"), 4, "one folder")
    yield Hostile("no pickle", archive(prefix="x/").replace(b"x/data.pkl", b"x/data.pkx"), 4, "no data.pkl")
    yield Hostile("a torch.jit archive", _with_record("archive/constants.pkl"), 4, "not a TorchScript module")
    yield Hostile("big-endian", good.replace(b"little", b"bigbig"), 4, "CRC-32")
    yield Hostile("all compressed", archive(compression=zipfile.ZIP_DEFLATED), 0)
    yield Hostile(
        "a bomb", archive(GOOD + bytes(50_000_000), compression=zipfile.ZIP_DEFLATED), 4, "MODELCLI_MAX_EXPANSION"
    )
    yield Hostile("bytes behind", good + b"x", 4, "further bytes after its end")
    yield Hostile("a comment", taken.joined(behind=b"hello", comment=5), 0)
    yield Hostile("a comment that is an end", taken.joined(behind=taken.end, comment=22), 4)
    yield Hostile("a comment cut off", taken.joined(behind=b"he", comment=5), 4)
    yield Hostile("no records", Parts(b"", [], b"").joined(), 4)
    yield Hostile("an end and nothing else", b"PK\x03\x04" + taken.end, 4)
    yield Hostile("no end", good[:-22], 4, "without a directory")
    yield Hostile("half a directory", good[:-100], 4)
    yield Hostile("bytes before", b"PK\x03\x04" + bytes(96) + good, 4)
    for lie in (
        {"count": 3},
        {"count": 5000, "here": 5000},
        {"length": 10},
        {"offset": 0},
        {"length": 2**31},
        {"disk": 1},
    ):
        yield Hostile(f"an end that lies: {lie}", taken.joined(**lie), 4)
    for lie in (
        {"size": 1}, {"count": 2**60, "here": 2**60}, {"count": 3}, {"length": 2**62}, {"offset": 2**63}, {"at": 0},
        {"at": 2**63}, {"disks": 7}, {"short": 9},
    ):  # fmt: skip
        yield Hostile(f"a longer end that lies: {lie}", zip64(**lie), 4)
    yield Hostile("too many entries", zip64(count=2_000_000, here=2_000_000), 4, "MODELCLI_MAX_ZIP_ENTRIES")
    yield Hostile("entries over one another", with_entry(2, 42, "<L", 0), 4)
    yield Hostile("an entry behind the file", with_entry(2, 42, "<L", 2**31), 4)
    yield Hostile("an entry of the longer form without it", with_entry(2, 42, "<L", 2**32 - 1), 4, "zip64")
    yield Hostile("an entry larger than the file", with_entry(2, 20, "<2L", 2**31, 2**31), 4)
    yield Hostile("an entry encrypted", with_entry(2, 8, "<H", 1), 4)
    yield Hostile("an entry of another method", with_entry(2, 10, "<H", 8), 4, "contradicts the directory")
    yield Hostile("an entry of another CRC-32", with_entry(2, 16, "<L", 1), 4, "contradicts the directory")
    yield Hostile(
        "a directory of another name", with_entry(2, 46, "<B", ord("b")), 4, "a name other than the directory's"
    )
    yield Hostile("a name without end", with_entry(3, 28, "<H", 60_000), 4)
    yield Hostile("an extra field without end", with_entry(3, 30, "<H", 60_000), 4)
    yield Hostile("an entry that is none", with_entry(1, 0, "<L", 0), 4)
    yield Hostile("a header encrypted", with_header(6, "<H", 1), 4)
    yield Hostile("a header of another method", with_header(8, "<H", 8), 4, "contradicts the directory")
    yield Hostile("a header of another size", with_header(18, "<2L", 4, 4), 4, "contradicts the directory")
    yield Hostile("a header of another name", with_header(30, "<B", ord("b")), 4, "a name other than the directory's")
    yield Hostile("a header without end", with_header(28, "<H", 60_000), 4)
    yield Hostile("a header that is none", with_header(0, "<L", 0), 4, "no header")
    yield Hostile("both encrypted", _both_encrypted(), 4, "encrypted")
    yield Hostile("a long name", _with_record("archive/" + "n" * 5000), 4, "MODELCLI_MAX_NAME_BYTES")
    yield Hostile("a damaged pickle", good.replace(b"a.weight", b"b.weight", 1), 4, "CRC-32")
    yield Hostile("a missing record", archive(records={}), 4, "data/0 is missing")
    yield Hostile("a short record", archive(records={"data/0": bytes(7)}), 4, "needs 8 bytes")


def _with_record(filename: str) -> bytes:
    taken = parts(archive())
    local = struct.pack("<4s2B4H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0x21, 0, 0, 0, len(filename), 0)
    entry = struct.pack(
        "<4s4B4H3L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0x21, 0, 0, 0, len(filename), 0, 0, 0, 0, 0,
        len(taken.records),
    )  # fmt: skip
    return Parts(taken.records + local + filename.encode(), [*taken.entries, entry + filename.encode()], b"").joined()


def _both_encrypted() -> bytes:
    data = with_header(6, "<H", 1)
    taken = parts(data)
    taken.entries[2] = patched(taken.entries[2], 8, "<H", 1)
    return taken.joined()


# --- pickles that lie, or that take ages ---------------------------------------------------------------------------


def pickled() -> Iterator[Hostile]:
    def one(title: str, data: bytes, code: int = 4, says: str = "") -> Hostile:
        return Hostile(title, archive(data), code, says)

    for title, payload in PAYLOADS.items():
        yield one(f"{title}, alone", b"\x80\x02" + payload + b".", 3, "run code")
        beside = state_dict(("a.weight", tensor()), ("x", payload))
        yield one(f"{title}, beside a tensor", beside, 0, "none was loaded")
    appending = name("os.environ") + b"(" + text("A") + text("B") + b"e"
    yield one("appending to a name", state_dict(("a", appending)), 4, "appends values to os.environ")
    items = name("os.environ") + text("A") + text("B") + b"s"
    yield one("items of a name", state_dict(("a", items)), 4, "sets items of os.environ")
    yield one("a class instance of protocol 0", b"(" + text(COMMAND) + b"ios\nsystem\n.")
    yield one("an object of protocol 1", b"(cos\nsystem\n" + text(COMMAND) + b"o.")
    yield one("an extension", b"\x80\x02\x82\x01.")
    yield one("a buffer from outside", b"\x80\x05\x97.")
    yield one("a memo number of four bytes", b"\x80\x02]r\xff\xff\xff\xff.")
    yield one("what the memo does not hold", b"\x80\x02h\x05.")
    yield one("a text longer than the file", b"\x80\x02X\xff\xff\xff\xffa.")
    yield one("a text of eight bytes' length", b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.")
    yield one("bytes longer than the file", b"\x80\x03B\xff\xff\xff\xffa.")
    yield one("bytes of eight bytes' length", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.")
    yield one("a bytearray of eight bytes' length", b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"a.")
    yield one("a number longer than the file", b"\x80\x02\x8b\xff\xff\xff\x7fa.")
    yield one("a number of a million digits", b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.")
    yield one("a frame longer than the file", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.")
    yield one("no last opcode", b"\x80\x02}")
    yield one("nothing", b"")
    yield one("a mark that is missing", b"\x80\x02t.")
    yield one("an empty stack", b"\x80\x02.")
    yield one("no opcode", b"\x80\x02\xff.")
    yield one("not UTF-8", b"\x80\x02X\x02\x00\x00\x00\xff\xff.")
    yield one("a name of a line without end", b"\x80\x02c" + b"a" * 100_000)
    yield one("a class of a long name", b"\x80\x02" + name("a." + "b" * 5000) + b".", 4, "MODELCLI_MAX_NAME_BYTES")
    yield one("a list of lists of lists", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    yield one("tuples of tuples", b"\x80\x02)" + b"\x85" * 100_000 + b".")
    yield one("a key of tuples of tuples", b"\x80\x02})" + b"\x86".join([b"2"] * 60) + b"\x86Ns.")
    yield one(
        "keys of one hash", b"\x80\x02}(" + b"".join(number(k * (2**61 - 1)) + b"N" for k in range(50_000)) + b"u."
    )
    yield one("a list that holds itself", b"\x80\x02]q\x00h\x00a.")
    yield one("a dict that holds itself many times", _itself_many_times(), 4)
    yield one("one dict under many names", _one_under_many_names(), 0)
    yield one("many copies of one list", _many_copies(), 4)
    yield one("a state dict that holds itself", b"\x80\x02}q\x00(" + text("a") + tensor() + text("b") + b"h\x00u.")
    yield one("a shape of negative size", state_dict(("a", tensor((-1,)))))
    yield one("a stride of negative size", state_dict(("a", tensor((2,), (-1,)))))
    yield one("a shape beyond its record", state_dict(("a", tensor((3,)))), 4, "needs 12 bytes")
    yield one("a stride beyond its record", state_dict(("a", tensor((2,), (2,)))), 4, "needs 12 bytes")
    yield one("an offset beyond its record", state_dict(("a", tensor((2,), (1,), offset=1))), 4, "needs 12 bytes")
    yield one("an offset of negative size", state_dict(("a", tensor(offset=-1))))
    yield one("a shape of 2^80 elements", state_dict(("a", tensor((2**40, 2**40), (0, 0)))))
    yield one("a shape of no element and 2^80", state_dict(("a", tensor((0, 2**40, 2**40), (0, 0, 0)))))
    yield one("a shape of a number of 1000 bits", state_dict(("a", tensor((2**1000,), (0,)))))
    yield one("a stride of a number of 1000 bits", state_dict(("a", tensor((1,), (2**1000,)))))
    yield one("a shape of 200,000 dimensions", state_dict(("a", _wide(200_000))))
    yield one("more sizes than strides", state_dict(("a", tensor((2, 1), (1,)))))
    yield one("a shape of texts", state_dict(("a", tensor().replace(sizes(2), b"(" + text("2") + b"t", 1))))
    yield one("a quantized tensor", state_dict(("a", quantized((8,)))), 0, "qint8")
    yield one("a quantized shape beyond its record", state_dict(("a", quantized((9,)))), 4, "needs 9 bytes")
    yield one("a quantized tensor without a scale", state_dict(("a", quantized((8,), b"N"))), 4, "has no scale")
    yield one("a sparse shape of 2^124 elements", state_dict(("a", sparse((2**62, 2**62)))), 4, "more elements")
    yield one("a sparse shape of negative size", state_dict(("a", sparse((-1, 2)))), 4, "a size or stride is -1")
    yield one("a storage of no known class", state_dict(("a", tensor(storage="torch.NoStorage"))), 4, "NoStorage")
    yield one("a storage of a foreign class", state_dict(("a", tensor(storage="os.system"))), 4, "os.system")
    yield one("a storage of two classes", _two_classes())
    yield one("a storage outside", state_dict(("a", tensor(key=text("../../data.pkl")))), 4, "is missing")
    yield one("a storage without a key", state_dict(("a", tensor(key=b"N"))))
    yield one("a storage of negative size", state_dict(("a", tensor(count=-1))))
    yield one("a tensor made by another name", state_dict(("a", tensor(rebuild="os.system"))), 3, "os.system")
    yield one("a persistent id that is none", b"\x80\x02NQ.")
    yield one("a state of a number", b"\x80\x02K\x01}b.")
    yield one("no state dict", b"\x80\x02" + text("hello") + b".", 4, "no state dict")
    yield one(
        "names with control characters", state_dict(("a\x1b[31m\u202eb\r\n", tensor())), 0, "\\x1b[31m\\u202eb\\r\\n"
    )
    yield one("names of markup", state_dict(("[bold red]a[/]", tensor())), 0, "[bold red]a[/]")
    yield one("a tensor's long name", state_dict(("n" * 5000, tensor())), 4, "MODELCLI_MAX_NAME_BYTES")
    yield one("half a surrogate", b"\x80\x02}(X\x03\x00\x00\x00\xed\xa0\x80" + tensor() + b"u.", 0, "\\ud800")


def _itself_many_times() -> bytes:
    holds = b"".join(text(str(number_)) + b"h\x00" for number_ in range(20_000))
    return b"\x80\x02}q\x00(" + holds + b"u."


def _one_under_many_names() -> bytes:
    """Return a state dict of 3,000 tensors under 3,000 keys: nine million tensors if each were visited."""
    inner = b"}(" + tensor().join(text(f"w{number_}") for number_ in range(3000)) + tensor() + b"uq\x00"
    return b"\x80\x02}(" + text("first") + inner + b"".join(text(f"n{n}") + b"h\x00" for n in range(3000)) + b"u."


def _many_copies() -> bytes:
    """Return a list of 20,000 pairs that is turned into a dict 20,000 times, with four opcodes each time."""
    pairs = b"](" + b"".join(text(str(n)) + b"N\x86" for n in range(20_000)) + b"eq\x00"
    ordered = name("collections.OrderedDict") + b"q\x010"
    return b"\x80\x02" + pairs + ordered + b"".join(b"h\x01h\x00\x85R0" for _ in range(20_000)) + b"."


def _wide(dimensions: int) -> bytes:
    shape = b"(" + b"K\x01" * dimensions + b"t"
    return tensor().replace(sizes(2), shape).replace(sizes(1), shape)


def _two_classes() -> bytes:
    return state_dict(("a", tensor()), ("b", tensor(storage="torch.DoubleStorage", count=1, shape=(1,))))


# --- the format before 1.6 -----------------------------------------------------------------------------------------

_MAGIC = b"\x80\x02" + b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def legacy(values: bytes = GOOD, *, order: bytes | None = None, storages: bytes | None = None) -> bytes:
    """Return a file as `torch.save` wrote it before 1.6: five pickles and the storages."""
    system = b"\x80\x02}(" + text("little_endian") + b"\x88u."
    keys = b"\x80\x02](" + text("0") + b"e." if order is None else order
    bytes_ = struct.pack("<Q", 2) + bytes(8) if storages is None else storages
    return _MAGIC + b"\x80\x02M\xe9\x03." + system + values + keys + bytes_


def legacies() -> Iterator[Hostile]:
    def one(title: str, data: bytes, code: int = 4, says: str = "") -> Hostile:
        return Hostile(f"old format: {title}", data, code, says)

    yield one("good", legacy(), 0)
    for title in ("os.system", "eval", "a new object", "a state", "a name of protocol 4"):
        alone = legacy(b"\x80\x02" + PAYLOADS[title] + b".", order=b"\x80\x02].", storages=b"")
        yield one(f"{title}, alone", alone, 3, "run code")
        yield one(f"{title}, first of all", _MAGIC + b"\x80\x02" + PAYLOADS[title] + b".")
        yield one(f"{title}, for the list", legacy(order=b"\x80\x02" + PAYLOADS[title] + b"."))
    yield one("no storages", legacy(storages=b""), 4, "ends before storage '0'")
    yield one(
        "a storage longer than the file", legacy(storages=struct.pack("<Q", 2**63) + bytes(8)), 4, "would end at byte"
    )
    yield one("a storage too short", legacy(storages=struct.pack("<Q", 1) + bytes(4)), 4, "should have 8 bytes")
    yield one("a list of other storages", legacy(order=b"\x80\x02](" + text("9") + b"e."))
    yield one("a list that is none", legacy(order=b"\x80\x02N."))
    yield one("an empty list", legacy(order=b"\x80\x02]."), 4, "is missing")
    yield one("another protocol", _MAGIC + b"\x80\x02K\x01.")
    yield one("nothing behind its start", _MAGIC)


# --- safetensors ---------------------------------------------------------------------------------------------------


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


def f32(begin: int, end: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def safetensors_files() -> Iterator[Hostile]:
    def one(title: str, data: bytes, code: int = 4, says: str = "") -> Hostile:
        return Hostile(f"safetensors: {title}", data, code, says)

    yield one("good", safetensors({"a": f32(0, 8, 2)}, bytes(8)), 0)
    yield one("a hole", safetensors({"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, bytes(12)), 4, "b starts at byte 8")
    yield one("an overlap", safetensors({"a": f32(0, 8, 2), "b": f32(4, 8, 1)}, bytes(8)), 4, "b starts at byte 4")
    yield one("bytes behind", safetensors({"a": f32(0, 4, 1)}, bytes(5)))
    yield one("bytes missing", safetensors({"a": f32(0, 4, 1)}, bytes(3)))
    yield one("a name twice", safetensors(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}'), 4, "twice")
    yield one("a header of 2^63 bytes", safetensors(b"{}", length=2**63), 4, "MODELCLI_MAX_HEADER_BYTES")
    yield one("a header longer than the file", safetensors(b"{}", length=1000), 4, "should have 1,000 bytes")
    yield one("nesting", safetensors(b'{"a":' * 200_000))
    yield one("a number of a million digits", safetensors(b'{"a":' + b"9" * 1_000_000 + b"}"))
    yield one("a shape of 2^80", safetensors({"a": f32(0, 0, 0, 2**40, 2**40)}))
    yield one("a long name", safetensors({"n" * 5000: f32(0, 4, 1)}, bytes(4)), 4, "MODELCLI_MAX_NAME_BYTES")
    yield one("control characters", safetensors({"\x1b]0;x\x07": f32(0, 4, 1)}, bytes(4)), 0, "\\x1b]0;x\\x07")
    yield one("a list", b"[" + safetensors([1])[9:])
    yield one(
        "a record that lies",
        safetensors({"__metadata__": {"modelcli": '{"schema":1}'}, "a": f32(0, 4, 1)}, bytes(4)),
        0,
    )


def indexes() -> Iterator[Hostile]:
    def one(title: str, document: object, code: int = 4, says: str = "") -> Hostile:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        return Hostile(f"index {title}", data, code, says, "m.index.json")

    for title, file in (
        ("absolute", "/etc/passwd"), ("above", "../x.safetensors"), ("above by steps", "a/../../x"),
        ("of a drive", "C:\\x.safetensors"), ("above on Windows", "a\\..\\..\\x"), ("empty", ""), ("of a null", "a\0b"),
        ("not there", "missing.safetensors"), ("a folder", "."),
    ):  # fmt: skip
        yield one(title, {"weight_map": {"a": file}})
    yield one("twice", b'{"weight_map":{"a":"x","a":"y"}}', 4, "twice")
    yield one("no map", {"metadata": {}})
    yield one("a map of numbers", {"weight_map": {"a": 1}})
    yield one("no JSON", b"{")
    yield one("deep", b'{"weight_map":' * 100_000)


def every() -> list[Hostile]:
    """Return all hostile files."""
    return [*zips(), *pickled(), *legacies(), *safetensors_files(), *indexes()]


__all__ = ["COMMAND", "MARKER", "Hostile", "archive", "every", "legacy", "safetensors", "state_dict", "tensor"]

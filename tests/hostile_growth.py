"""Small files that describe huge structures: one value under a million names, names with a thousand components.

Each is of a few kilobytes or of one or two megabytes, and would take minutes or gigabytes where its values were looked
through, named or written once for each place that they have.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from modelcli.checkpoints.record import SAFETENSORS_KEY, ZIP_RECORD
from tests.hostile import Hostile, archive, f32, name, number, quantized, safetensors, sizes, state_dict, tensor, text

EXPANSION = "MODELCLI_MAX_EXPANSION"


def put(index: int) -> bytes:
    """Return opcodes that memoize the value on the stack and pop it."""
    return b"r" + struct.pack("<I", index) + b"0"


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def named(*items: tuple[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items) + b"u"


def tuple_of(items: bytes) -> bytes:
    return b"(" + items + b"t"


def whole(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def module(
    parameters: bytes = b"}", modules: bytes = b"}", hidden: bytes | None = None, kind: bytes = name("nets.Net")
) -> bytes:
    """Return the pickle of a whole module, as `torch.save(model)` writes it."""
    state = [("_parameters", parameters), ("_buffers", b"}"), ("_modules", modules)]
    if hidden is not None:
        state.append(("_non_persistent_buffers_set", hidden))
    return kind + b")\x81" + named(*state) + b"b"


def many(count: int, value: bytes) -> bytes:
    """Return the pickle of a dict with `count` keys for the same value."""
    return named(*((f"m{index}", value) for index in range(count)))


# --- modules -------------------------------------------------------------------------------------------------------


def each_module_twice() -> bytes:
    """26 modules, each with the previous one under two names: 2^26 paths in three kilobytes."""
    made = module(named(("w", tensor())))
    for level in range(26):
        made += put(1000 + level) + module(modules=named(("a", get(1000 + level)), ("b", get(1000 + level))))
    return whole(made)


def one_dict_of_parameters() -> bytes:
    shared = named(*((f"p{index}", tensor()) for index in range(300))) + put(900)
    return whole(shared + module(modules=many(3000, module(get(900)))))


def one_set_of_hidden_names() -> bytes:
    names = b"".join(text(f"s{index}") for index in range(50_000))
    shared = name("builtins.set") + b"](" + names + b"e\x85R" + put(900)
    return whole(shared + module(modules=many(2000, module(named(("w", tensor())), hidden=get(900)))))


def one_long_class_name() -> bytes:
    kind = name("nets." + "N" * 4000) + put(900)
    return whole(kind + module(modules=many(5000, module(kind=get(900)))))


def modules_in_one_another() -> bytes:
    """300 nested modules around a leaf with 900 tensors, each of which has a name with 300 components."""
    made = module(named(*((f"w{index}", tensor()) for index in range(900))))
    for level in range(300):
        made += put(1000 + level) + module(modules=named(("d" * 12, get(1000 + level))))
    return whole(made)


def modules() -> Iterator[Hostile]:
    def one(title: str, data: bytes, code: int = 4, says: str = EXPANSION) -> Hostile:
        return Hostile(f"modules: {title}", archive(data), code, says)

    yield one("each twice in the next", each_module_twice())
    yield one("one dict of parameters", one_dict_of_parameters())
    yield one("one set of hidden names", one_set_of_hidden_names())
    yield one("one long class name", one_long_class_name())
    yield one("in one another", modules_in_one_another())


# --- values --------------------------------------------------------------------------------------------------------


def one_tuple_for_a_key() -> bytes:
    long = tuple_of(b"K\x01" * 200_000) + put(900)
    return whole(long + b"}(" + text("a") + tensor() + (get(900) + b"N") * 9000 + b"u")


def tuples_of_one_hash() -> bytes:
    """5,000 keys with the same hash: the hash of an integer is its remainder modulo a prime."""
    prefix = b"".join(b"K\x01" for _ in range(50))
    keys = b"".join(tuple_of(prefix + number(times * (2**61 - 1))) + b"N" for times in range(5000))
    return whole(b"}(" + text("a") + tensor() + keys + b"u")


def one_inner_dict() -> bytes:
    inner = many(50_000, b"N") + put(900)
    outer = named(("x", get(900)), ("a", tensor()))
    return whole(inner + many(3000, outer))


def one_list_of_pairs() -> bytes:
    pairs = b"](" + b"".join(text(str(index)) + b"N\x86" for index in range(20_000)) + b"e" + put(900)
    ordered = name("collections.OrderedDict") + get(900) + b"\x85R0"
    return whole(pairs + ordered * 2000 + state_dict(("a", tensor()))[2:-1])


def one_row_of_arguments() -> bytes:
    """A call with 200,000 arguments that is repeated many times, for a view and for a storage."""
    view = tensor()
    arguments = view[view.index(b"(") : -2] + b"N" * 200_000 + b"t" + put(900)
    call = name("torch._utils._rebuild_tensor_v2") + put(901)
    return whole(arguments + call + (get(901) + get(900) + b"R0") * 20_000 + state_dict(("a", tensor()))[2:-1])


def one_persistent_id() -> bytes:
    storage = tuple_of(
        text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + number(2) + b"N" * 200_000
    )
    return whole(storage + put(900) + (get(900) + b"Q0") * 20_000 + state_dict(("a", tensor()))[2:-1])


def calls_in_one_another() -> bytes:
    """900 nested calls around a tensor, repeated 20,000 times."""
    rebuild, kind = name("torch._tensor._rebuild_from_type_v2"), name("torch.Tensor")
    plain = tensor()
    inner = plain[plain.index(b"(") : -1]  # its arguments
    made = rebuild + put(901) + kind + put(902) + name("torch._utils._rebuild_tensor_v2") + put(903)
    made += b"(" + get(903) + get(902) + inner + b"Nt" + put(904)
    for level in range(900):
        made += b"(" + get(901) + get(902) + get(904 + level) + b"Nt" + put(905 + level)
    return whole(made + (get(901) + get(1804) + b"R0") * 20_000 + state_dict(("a", tensor()))[2:-1])


def one_list_of_scales() -> bytes:
    scales = b"](" + b"K\x01" * 100_000 + b"e" + put(900)
    scheme = tuple_of(name("torch.per_channel_affine") + get(900) + get(900) + b"K\x00")
    return whole(scales + many(2000, quantized((8,), scheme)))


def a_shape_without_end(offset: int) -> bytes:
    """60 nested pairs of the same pair: computing its hash or its text would never end."""
    endless = b")" + b"2\x86" * 60
    return state_dict(("a", tensor(offset=offset).replace(sizes(2), endless, 1)))


def one_long_name() -> bytes:
    """A tensor with a name of 4,000 characters and 20,000 other names, all tied to the first."""
    first = text("n" * 4000) + tensor() + b"r" + struct.pack("<I", 900)
    return whole(b"}(" + first + b"".join(text(f"t{index}") + get(900) for index in range(20_000)) + b"u")


def values() -> Iterator[Hostile]:
    def one(title: str, data: bytes, code: int = 4, says: str = EXPANSION) -> Hostile:
        return Hostile(f"values: {title}", archive(data), code, says)

    yield one("one tuple for a key", one_tuple_for_a_key())
    yield one("tuples of one hash", tuples_of_one_hash())
    yield one("one inner dict", one_inner_dict(), 2, "cannot tell which to use")
    yield one("one list of pairs", one_list_of_pairs())
    yield one("one row of arguments", one_row_of_arguments(), 4, "arguments that torch.save never writes")
    yield one("one persistent id", one_persistent_id(), 4, "does not describe a storage")
    yield one("calls in one another", calls_in_one_another())
    yield one("one list of scales", one_list_of_scales())
    yield one("a shape without end", a_shape_without_end(0), 4, "a size or stride is a tuple")
    yield one("a shape without end at no offset", a_shape_without_end(-1), 4, "offset")
    yield one("one long name for many ties", one_long_name())
    yield one("empty lists", whole(tuple_of(b"]" * 1_500_000)))
    yield one("empty dicts", whole(tuple_of(b"}" * 1_500_000)))
    calls = name("torch.Size") + put(900) + tuple_of((get(900) + b")R") * 100_000)
    yield one("objects of nothing", whole(calls), 4, "no state dict")
    shape = tuple_of(b"K\x01" * 1000) + put(900)
    wide = tensor().replace(sizes(2), get(900)).replace(sizes(1), get(900))
    yield one("one shape of 1,000 dimensions", whole(shape + many(9000, wide)), 4, "MODELCLI_MAX_DIMENSIONS")


# --- names ---------------------------------------------------------------------------------------------------------


def header(names: Iterator[str]) -> bytes:
    entries = {key: f32(4 * index, 4 * index + 4, 1) for index, key in enumerate(names)}
    return safetensors(entries, bytes(4 * len(entries)))


def names() -> Iterator[Hostile]:
    def one(title: str, data: bytes, code: int = 4, says: str = EXPANSION, *, tree: bool = False) -> Hostile:
        return Hostile(f"names: {title}", data, code, says, is_only_a_tree=tree)

    yield one("of 2,000 levels", header(f"{index}.{'a.' * 2000}w" for index in range(300)), 4, "MODELCLI_MAX_NESTING")
    yield one("of dots", header(iter(["." * 4000 + "w"])), 4, "MODELCLI_MAX_NESTING")
    yield one("of 900 levels, each its own", header(f"{index}.{'a.' * 900}w" for index in range(300)), tree=True)
    yield one("of 900 levels", header(f"{'a.' * 900}{index}" for index in range(300)), 0, "a.a.a")
    yield one("of 900 dots", header(iter(["." * 900 + "w"])), 0, ".....")
    yield one("of 20 levels, each its own", header(f"{index}{'.a' * 20}" for index in range(20_000)), tree=True)
    yield one("one long and many short", header(iter(["n" * 4000, *map(str, range(10_000))])), 0, "nnnn")
    yield one("a shape of a million dimensions", safetensors({"w": f32(0, 4, *[1] * 1_000_000)}, bytes(4)), 4, "64")
    yield one("a header of brackets", safetensors(b'{"__metadata__":' + b"[" + b"[]," * 3_000_000 + b"[]]}"))


# --- records -------------------------------------------------------------------------------------------------------


def recorded(classes: list[object], modules_: list[object], layers: list[object]) -> str:
    """Return the record of a model with one tensor, `w`, as modelcli writes it."""
    blueprint: dict[str, object] = {
        "classes": [{"type": None, "bases": []}, *classes],
        "modules": [{"path": "", "class": 0}, *modules_],
        "tensors": [{"name": "w", "shape": [1], "dtype": "float32"}],
    }
    unknown = dict.fromkeys(("inputs", "macs", "input_bytes", "forward_backward_bytes", "reason"))
    blueprint["trace"] = {"layers": layers, **unknown}
    document: dict[str, object] = {
        "schema": 1,
        "reference": None,
        "weights": None,
        "seed": 0,
        "edits": [],
        "frozen": [],
    }
    return json.dumps({**document, "blueprint": blueprint})


def records() -> Iterator[Hostile]:
    def one(title: str, record: str, code: int = 4, says: str = EXPANSION) -> Hostile:
        data = safetensors({"__metadata__": {SAFETENSORS_KEY: record}, "w": f32(0, 4, 1)}, bytes(4))
        return Hostile(f"a record {title}", data, code, says)

    places = [{"path": str(index), "class": 1} for index in range(5000)]
    yield one("of one long class name", recorded([{"type": "N" * 100_000, "bases": []}], [*places], []))
    brackets = recorded([], [], []).replace('"edits": []', '"edits": [' + "[]," * 1_000_000 + "[]]")
    yield one("of brackets", brackets)
    in_zip = archive(state_dict(("a", tensor())), {"data/0": bytes(8), ZIP_RECORD: brackets.encode()})
    yield Hostile("a record of brackets in a zip file", in_zip, 4, EXPANSION)
    deep: list[object] = [{"path": ".".join("a" * level), "class": 0} for level in range(1, 1200)]
    yield one("of 1,200 levels", recorded([], deep, []), 0, "w ")
    lines = {"path": ".".join("a" * 1199), "class": 0, "config": "\n" * 20_000, "own_repr": "\n" * 20_000}
    yield one("of lines far to the right", recorded([], [*deep[:-1], lines], []))
    missing = [[0, str(index)] for index in range(50_000)]
    yield one("of what is not there", recorded([], [{"path": "a", "class": 0, "absent": missing}], []), 0, "w ")
    nested: object = [1]
    for _ in range(400):
        nested = [nested]
    yield one("of an output in lists of lists", recorded([], [], [["", nested, 0]]), 0, "w ")


# --- folders of torch.distributed.checkpoint -----------------------------------------------------------------------

_DCP = "torch.distributed.checkpoint"


def built(dotted: str, *fields: tuple[str, bytes]) -> bytes:
    return name(f"{_DCP}.{dotted}") + b")\x81" + named(*fields) + b"b"


def size(*values_: int) -> bytes:
    return name("torch.Size") + b"(" + sizes(*values_) + b"tR"


def chunk(offsets: tuple[int, ...], sizes_: tuple[int, ...]) -> bytes:
    return built("metadata.ChunkStorageMetadata", ("offsets", size(*offsets)), ("sizes", size(*sizes_)))


def entry(shape: tuple[int, ...], chunks: bytes) -> bytes:
    layout = name("torch.serialization._get_layout") + b"(" + text("torch.strided") + b"tR"
    state = tuple_of(name("torch.float32") + layout + b"\x89NN")
    properties = name(f"{_DCP}.metadata.TensorProperties") + b")\x81" + state + b"b"
    fields = ("properties", properties), ("size", size(*shape)), ("chunks", chunks)
    return built("metadata.TensorStorageMetadata", *fields)


def place(key: str, offsets: bytes) -> bytes:
    where = built("metadata.MetadataIndex", ("fqn", text(key)), ("offset", offsets))
    fields = ("relative_path", text("x.distcp")), ("offset", b"K\x00"), ("length", number(500))
    return where + built("filesystem._StorageInfo", *fields)


def account(entries: bytes, places: bytes = b"", planner: bytes = b"N") -> bytes:
    fields = (
        ("state_dict_metadata", b"}(" + entries + b"u"),
        ("planner_data", planner),
        ("storage_data", b"}(" + places + b"u"),
    )
    return built("metadata.Metadata", *fields)


def one_list_of_parts() -> bytes:
    parts = b"](" + chunk((0,), (3,)) + chunk((0,), (0,)) * 5000 + b"e" + put(900)
    names_ = [f"t{index}" for index in range(1000)]
    entries = b"".join(text(key) + entry((3,), get(900)) for key in names_)
    return parts + account(entries, b"".join(place(key, size(0)) for key in names_))


def one_tensor_cut_along_every_axis() -> bytes:
    shape = (2,) * 60
    return account(text("t") + entry(shape, b"](" + chunk((0,) * 60, (1,) * 60) * 2 + b"e"))


def one_way() -> bytes:
    way = tuple_of(text("a") * 900) + put(900)
    entries = b"".join(text(f"t{index}") + b"N" for index in range(9000))
    return way + account(entries, planner=many(9000, get(900)).replace(text("m0"), text("t0")))


def folders() -> Iterator[Hostile]:
    def one(title: str, value: bytes, says: str = EXPANSION) -> Hostile:
        return Hostile(f"folder: {title}", whole(value), 4, says, ".metadata", {"x.distcp": bytes(600)})

    yield one("one list of parts", one_list_of_parts())
    yield one("a tensor cut along every axis", one_tensor_cut_along_every_axis())
    far = named(("t", tuple_of(text("a") + number(10**9))))
    part = text("t") + entry((2,), b"](" + chunk((0,), (2,)) + b"e")
    yield one("the last of a billion", account(part, place("t", size(0)), far))


def every() -> list[Hostile]:
    return [*modules(), *values(), *names(), *records(), *folders()]


# --- views with more elements than the file has bytes -----------------------------------------------------------------


def views() -> dict[str, bytes]:
    """Return small files whose values would fill a disk, for `--values` and `--stats`."""

    def viewing(count: int, *tensors: bytes) -> bytes:
        items = ((f"w{index}", made) for index, made in enumerate(tensors))
        return archive(state_dict(*items), {"data/0": bytes(4 * count)})

    def view(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 1) -> bytes:
        return tensor(shape, stride, offset=offset, count=count)

    return {
        "a plain one": viewing(2, view((2,), (1,), count=2)),
        "expanded along nine axes": viewing(1, view((6,) * 9, (0,) * 9)),
        "expanded along 64 axes": viewing(1, *[view((1,) * 64, (0,) * 64)] * 2000),
        "10^8 of one": viewing(1, view((10**8,), (0,))),
        "rows over one another": viewing(200_000, view((10**5, 10**5), (1, 1), count=200_000)),
        "a tensor at each offset": viewing(9_000, *(view((4_000,), (1,), offset, 9_000) for offset in range(4_000))),
        "pieces far apart": viewing(2_300_000, view((2,) * 16, (140_000,) * 16, count=2_300_000)),
    }

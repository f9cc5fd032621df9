"""Pickles as inert values: an interpreter of the opcodes that resolves no name and calls nothing.

What `torch.save` wrote comes back as plain Python values, a `TensorEntry` for each tensor, and `Opaque` objects for
everything else, which remember the name of their class and what it was made from.
"""

from __future__ import annotations

import codecs
import collections
import functools
import io
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from modelcli.checkpoints import limits, shapes
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import Storage
from modelcli.errors import FileFormatError, ModelcliError
from modelcli.model.dtypes import ITEM_BYTES, is_differentiable
from modelcli.model.tensors import value_class


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. It is never looked up."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}"


@value_class
class StorageRef:
    """A persistent id: the bytes of a storage, `count` elements of `dtype` (None for raw bytes).

    `offset` is where it starts in them, in elements: torch before 0.4 saved views of storages. `is_meta` says that it
    was saved from the meta device, so that torch gives no tensor in it any numbers.
    """

    span: Storage
    dtype: str | None
    count: int
    offset: int = 0
    is_meta: bool = False

    @property
    def item(self) -> int:
        """The bytes of an element."""
        return 1 if self.dtype is None else ITEM_BYTES[self.dtype]


@dataclass(eq=False, slots=True)
class Opaque:
    """An object that is kept as what it was made from: `call(*args)`, then items, appended values and state."""

    call: Any
    args: Any
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)
    appended: list[Any] = field(default_factory=list)
    how: str = "reduce"


class OrderedDict(dict[Any, Any]):
    """`collections.OrderedDict`, with the attributes that were set on it."""

    state: dict[str, Any] | None = None


_STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
#: The classes of torch's typed storages, by dtype.
STORAGE_CLASSES = {dtype: name for name, dtype in _STORAGE_DTYPES.items()}
#: What `torch.Tensor` was called for each dtype and device, before it had one name.
_TENSOR_CLASSES = tuple(
    f"torch.{device}{kind}Tensor"
    for device in ("", "cuda.", "sparse.", "cuda.sparse.")
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    if (device, kind) not in (("sparse.", "Bool"), ("cuda.sparse.", "Bool"))
)

#: What torch.load(weights_only=True) accepts as well, besides tensors: kept as it is, and harmless.
HARMLESS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "torch.Size",
        "torch.device",
        "torch.Tensor",
        "torch.serialization._get_layout",
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.set",
        "builtins.complex",
        "__builtin__.set",
        "__builtin__.bytearray",
        "__builtin__.complex",
        "torch.nn.parameter.Parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_wrapper_subclass",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._tensor._rebuild_from_type_v2",
        "torch.per_tensor_affine",
        "torch.per_tensor_symmetric",
        "torch.per_channel_affine",
        "torch.per_channel_symmetric",
        "torch.per_channel_affine_float_qparams",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        *(f"torch.{dtype}" for dtype in ITEM_BYTES),
        *(f"torch.{storage}" for storage in _STORAGE_DTYPES),
        *(f"torch.cuda.{storage}" for storage, dtype in _STORAGE_DTYPES.items() if not dtype.startswith("q")),
        *_TENSOR_CLASSES,
    }
)

#: What an enum is pickled by in some versions of Python 3.11: `getattr(class, name)`, with the classes and the names
#: that may be meant. Any other attribute leads out of the enum: `__globals__` of a method holds all of a module.
_GETATTR = frozenset({"builtins.getattr", "__builtin__.getattr"})
_ENUMS = frozenset(
    {
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    }
)
_MEMBERS = frozenset({"TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT"})


@dataclass(frozen=True)
class Pickle:
    """The value of a pickle, the names in it that are on no allow-list, and what may still be made of its file.

    `attributes` are the names and values of attributes that are set on tensors: no state dict loads them.
    """

    value: Any
    foreign: tuple[str, ...]
    budget: limits.Budget
    attributes: tuple[tuple[str, Any], ...] = ()


PARAMETER = "torch.nn.parameter.Parameter"
_COUNTER = "collections.Counter"
#: What is made here, where its arguments are those that torch writes; all else is kept as a call.
_MADE = frozenset(
    {
        PARAMETER,
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
    }
)
#: Attributes that make a tensor another one when they are set: torch gives it other numbers, another class or flag.
TENSOR_PROPERTIES = frozenset(
    {
        *("data", "real", "imag", "requires_grad", "grad", "grad_dtype", "_grad", "_grad_fn", "volatile", "names"),
        *("_backward_hooks", "_post_accumulate_grad_hooks", "_is_param"),
    }
)
#: What every dict has. An attribute of such a name would stand before the dict's own: `items` that gives other items.
_DICT_ATTRIBUTES = frozenset(dir(collections.OrderedDict))
#: Where a storage was when it was saved, but for the meta device, which has no values.
_LOCATION = re.compile(r"(?!meta\b)[a-z][a-z0-9_]*(?::[0-9]{1,9})?")
#: Numbers as Python's pickler writes them in text. Python's own readers disagree about others: one takes `010` for 8.
_DECIMAL = re.compile(rb"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(rb"-?(?:[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?|inf)|nan", re.IGNORECASE)
#: Behind every place in a pickle.
_NO_FRAME = 1 << 63
_PLAIN_DTYPES = frozenset(dtype for dtype in ITEM_BYTES if not dtype.startswith("q"))
_SEQUENCES = frozenset({list, tuple})
#: Opcodes whose argument is a line of text.
_LINES = frozenset(b"cIFLSVgp")

#: Makes a value of the arguments of a call; None where it is to be kept as a call.
Call = Callable[[tuple[Any, ...]], Any]
#: Gives the bytes of a storage by its key and dtype (None for raw bytes).
SpanOf = Callable[[str, str | None], Storage]

_U4 = struct.Struct("<I")
#: What an integer has at most that `torch.load(weights_only=True)` reads: LONG1 counts its bytes in a single one.
_INTEGER_BITS = 255 * 8 - 1
#: Opcodes that state dicts have besides those that are decoded on the spot: their names, and how an argument is read.
#: `pickletools` has all others; its import takes longer than reading a file.
_USUAL: dict[int, tuple[str, struct.Struct | None]] = {
    0x80: ("PROTO", struct.Struct("<B")),
    0x4A: ("BININT", struct.Struct("<i")),
    0x47: ("BINFLOAT", struct.Struct(">d")),
    **{
        ord(code): (name, None)
        for code, name in {
            "0": "POP",
            "1": "POP_MARK",
            "2": "DUP",
            "N": "NONE",
            "\x88": "NEWTRUE",
            "c": "GLOBAL",
            "]": "EMPTY_LIST",
            "}": "EMPTY_DICT",
            "\x8f": "EMPTY_SET",
            "l": "LIST",
            "d": "DICT",
            "a": "APPEND",
            "e": "APPENDS",
            "s": "SETITEM",
            "u": "SETITEMS",
            "\x90": "ADDITEMS",
            "\x93": "STACK_GLOBAL",
            "\x94": "MEMOIZE",
            "\x81": "NEWOBJ",
            "b": "BUILD",
        }.items()
    },
}
_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_REBUILD_META = Global("torch._utils", "_rebuild_meta_tensor_no_storage")
_ORDERED_DICT = Global("collections", "OrderedDict")
_INT_BYTES = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
_INT = rb"(?:K.|M..|J.{4})"
_SIZES = rb"%(i)s\x85|%(i)s{2}\x86|%(i)s{3}\x87|\(%(i)s{4,64}t" % {b"i": _INT}
#: What torch.save writes for a tensor, from behind `_rebuild_tensor_v2` to its last opcode, once the memo has more than
#: 256 entries: a storage with its class, key, place and size (and before 1.6 None: it is whole); offset, shape, stride
#: (which are not empty); requires_grad; no hooks. Each thing made is put into the memo.
_TENSOR = re.compile(
    rb"\(\((h.h.X.{4})([0-9]{1,20})(r.{4}h.)(%(i)s)(N?)(tr.{4}Q)"
    rb"(%(i)s)(%(s)s)(r.{4})(%(s)s)(r.{4}[\x88\x89]h.\)Rr.{4}tr.{4}Rr.{4})" % {b"i": _INT, b"s": _SIZES},
    re.DOTALL,
)
#: How many opcodes that is, at least; each makes a value, or remembers one.
_TENSOR_OPCODES = 30
#: What stands between its texts and numbers, which tells where in the memo each thing is found, or put.
_BEFORE_KEY = struct.Struct("<xBxBxI")
_BEHIND_KEY = struct.Struct("<xIxB")
_BEHIND_ID = struct.Struct("<2xIx")
_BEHIND_SHAPE = struct.Struct("<xI")
_BEHIND_STRIDE = struct.Struct("<xIBxB3xI2xI2xI")
#: How many opcodes are run between two looks at the limits.
_BLOCK = 65_536
#: Each byte pays for what is made of it, and again for what is done with that: a module is made, and named.
_TIMES = 2
#: What a list, a dict or an object takes in a file: the least that torch.save writes for one, and what is in it.
_CONTAINER = 16
#: What an item of a dict takes.
_ITEM = 32


def _no_storages(key: str, _dtype: str | None) -> Storage:
    raise FileFormatError(f"storage {key!r} stands where none belongs")


def read(
    data: bytes | BinaryIO,
    where: str,
    span_of: SpanOf = _no_storages,
    budget: limits.Budget | None = None,
    *,
    exact: bool = False,
    encoding: str = "utf-8",
    calls: Mapping[str, Call] | None = None,
) -> Pickle:
    """Interpret a pickle, or the next one of a stream, which then stands behind it; `where` names it.

    `budget` is that of the file of which it is but a part; a pickle that is the whole of one has its own. `exact` says
    that a storage has exactly the bytes that its elements take, and not more. `encoding` is that of the texts that
    Python 2 wrote as bytes; torch takes UTF-8. `calls` make a value of the arguments of a function, by its name: what
    they make is no object of a foreign class, and where they give None it is.

    Raises FileFormatError where it is damaged or beyond a limit, and where it does what Python's own reader would give
    another meaning than is shown here.
    """
    start = 0 if isinstance(data, bytes) else data.tell()
    text = data if isinstance(data, bytes) else data.read()
    budget = budget or limits.Budget(where, 0, _TIMES)
    budget.earn(len(text))
    machine = _Machine(where, span_of, budget, exact=exact, encoding=encoding)
    machine.calls = calls or {}
    try:
        value, end = machine.run(text)
    except ModelcliError:
        raise
    except Exception as error:
        raise FileFormatError(f"{where} is damaged: {error}") from None
    if not isinstance(data, bytes):
        data.seek(start + end)
    return Pickle(value, tuple(machine.foreign), budget, tuple(machine.attributes))


def _opcode(code: int, where: str) -> tuple[str, struct.Struct | Callable[[Any], Any] | None]:
    """The name of an opcode, and what reads its argument; None where it has none."""
    if (found := _USUAL.get(code)) is not None:
        return found
    name, read = _unusual().get(code, ("", None))
    if not name:
        raise FileFormatError(f"{where} is damaged: {code:#04x} is no opcode")
    return name, read


@functools.cache
def _unusual() -> dict[int, tuple[str, Callable[[Any], Any] | None]]:
    import pickletools

    return {
        ord(opcode.code): (opcode.name, None if opcode.arg is None else opcode.arg.reader)
        for opcode in pickletools.opcodes
    }


class _Machine:
    """The pickle virtual machine, with every construction inert."""

    def __init__(self, where: str, span_of: SpanOf, budget: limits.Budget, *, exact: bool, encoding: str) -> None:
        self.where = where
        self.budget = budget
        self.span_of = span_of
        self.exact = exact
        self.encoding = encoding
        self.calls: Mapping[str, Call] = {}
        #: What lies above the last mark, which is all that an opcode may touch, and what lies below each mark.
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        #: What was put into the memo under 0, 1, 2 and so on, as nearly every pickler counts: a list of a million takes
        #: a tenth of the memory of a dict. As soon as a number is left out, the others go to `memo_by_number`.
        self.memo: list[Any] = []
        self.memo_by_number: dict[int, Any] = {}
        self.foreign: dict[str, None] = {}
        self.attributes: list[tuple[str, Any]] = []
        self.getattr_misused = False
        self.storages: dict[str, StorageRef] = {}
        self.views: dict[str, tuple[str, StorageRef]] = {}
        self.resolved: dict[tuple[Any, ...], Storage] = {}
        self.extents: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        #: How often a key with a hash that a file can choose was put into a dict, by the dict and the hash.
        self.chosen_hashes: Counter[tuple[int, int]] = Counter()

    def run(self, data: bytes) -> tuple[Any, int]:
        """The value of the pickle at the start of `data`, and where it ends.

        The opcodes that make up nearly all of a state dict are decoded here, the commonest first; `pickletools` knows
        the arguments of the others.
        """
        stack, below = self.stack, self.below
        position, nodes, stream = 0, 0, io.BytesIO(data)
        left = limits.OPCODES.value
        frame_end = _NO_FRAME
        while left > 0:
            block = min(_BLOCK, left)
            left -= block
            for _ in range(block):
                if position >= frame_end:
                    if position > frame_end:  # Python's reader drops the first part of an argument that is cut in two
                        raise FileFormatError(f"{self.where} is damaged: a frame ends inside an opcode")
                    frame_end = _NO_FRAME
                code = data[position]
                position += 1
                if code == 0x72:  # LONG_BINPUT
                    self._remember(_U4.unpack_from(data, position)[0], stack[-1])
                    position += 4
                elif code == 0x71:  # BINPUT
                    self._remember(data[position], stack[-1])
                    position += 1
                elif code == 0x68:  # BINGET
                    value = self._remembered(data[position])
                    position += 1
                    if value.__class__ is Global and value == _REBUILD and (found := _TENSOR.match(data, position)):
                        made = self._saved_tensor(found)
                        if made is not None:
                            value = made
                            position = found.end()
                            left -= _TENSOR_OPCODES
                            nodes += _TENSOR_OPCODES
                    stack.append(value)
                elif code == 0x4B:  # BININT1
                    stack.append(data[position])
                    position += 1
                elif code == 0x28:  # MARK
                    below.append(stack)
                    stack = self.stack = []
                elif code == 0x74:  # TUPLE
                    nodes += 1
                    made = tuple(self._to_mark())
                    stack = self.stack
                    stack.append(made)
                elif code == 0x58:  # BINUNICODE
                    (size,) = _U4.unpack_from(data, position)
                    position += 4 + size
                    if position > len(data):
                        raise FileFormatError(f"{self.where} is cut off inside a text of {size:,} bytes")
                    nodes += 1
                    stack.append(str(data[position - size : position], "utf-8", "surrogatepass"))
                elif code == 0x52:  # REDUCE
                    nodes += 1
                    args, function = stack.pop(), stack.pop()
                    stack.append(self._reduce(function, args))
                elif code == 0x51:  # BINPERSID
                    nodes += 1
                    stack.append(self._storage(stack.pop()))
                elif code == 0x29:  # EMPTY_TUPLE
                    stack.append(())
                elif code == 0x89:  # NEWFALSE
                    stack.append(False)
                elif 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                    start = len(stack) - (code - 0x84)
                    if start < 0:
                        raise FileFormatError(f"{self.where} is damaged: a tuple of more than there is")
                    nodes += 1
                    stack[start:] = [tuple(stack[start:])]
                elif code == 0x4D:  # BININT2
                    stack.append(data[position] | data[position + 1] << 8)
                    position += 2
                elif code == 0x6A:  # LONG_BINGET
                    stack.append(self._remembered(_U4.unpack_from(data, position)[0]))
                    position += 4
                elif code == 0x2E:  # STOP
                    limits.NODES.check(nodes, self.where)
                    if frame_end not in (position, _NO_FRAME):
                        raise FileFormatError(f"{self.where} is damaged: a frame does not end where its pickle does")
                    return stack.pop(), position
                else:
                    name, read = _opcode(code, self.where)
                    arg: Any = None
                    if code in _LINES:
                        end = data.index(b"\n", position)
                        arg = data[position:end]
                        position = end + 1
                        if code == 0x63:  # GLOBAL: two lines
                            end = data.index(b"\n", position)
                            arg = arg, data[position:end]
                            position = end + 1
                    elif isinstance(read, struct.Struct):
                        (arg,) = read.unpack_from(data, position)
                        position += read.size
                    elif read is not None:
                        stream.seek(position)
                        arg = read(stream)
                        position = stream.tell()
                    nodes += 1
                    if code == 0x95:  # FRAME
                        if frame_end != _NO_FRAME or position + arg > len(data):
                            raise FileFormatError(f"{self.where} is damaged: a frame is longer than what it stands in")
                        frame_end = position + arg
                        continue
                    self._step(name, arg)
                    stack = self.stack
            limits.NODES.check(nodes, self.where)
        raise limits.OPCODES.exceeded(self.where, f"more than {limits.OPCODES.value:,} opcodes")

    def _saved_tensor(self, found: re.Match[bytes]) -> Any:
        """What `_TENSOR` matched, with every effect of its opcodes: a whole tensor in one step instead of thirty.

        None, and no effect, where it numbers what it puts into the memo in a way of its own: then its opcodes have to
        be run one by one, for what it puts there may be what it takes from there.
        """
        before_key, key, behind_key, count, whole, behind_id, *view = found.groups()
        offset, shape, behind_shape, stride, behind_stride = view
        word, kind, length = _BEFORE_KEY.unpack(before_key)
        key_at, place = _BEHIND_KEY.unpack(behind_key)
        (id_at,) = _BEHIND_ID.unpack(behind_id)
        (shape_at,) = _BEHIND_SHAPE.unpack(behind_shape)
        stride_at, grad, hooks, hooks_at, args_at, made_at = _BEHIND_STRIDE.unpack(behind_stride)
        memo, first = self.memo, len(self.memo)
        numbers = (key_at, id_at, shape_at, stride_at, hooks_at, args_at, made_at)
        if first < 256 or numbers != tuple(range(first, first + 7)) or self.memo_by_number:
            return None
        if length != len(key):
            raise FileFormatError(f"{self.where} is damaged: a storage's key is not as long as it says")
        name, sizes, steps = key.decode(), _integers(shape), _integers(stride)
        storage_id: tuple[Any, ...] = (memo[word], memo[kind], name, memo[place], _integers(count)[0])
        if whole:
            storage_id = (*storage_id, None)
        storage = self._storage(storage_id)
        start, called = _integers(offset)[0], memo[hooks]
        none = OrderedDict() if called == _ORDERED_DICT else self._reduce(called, ())
        args = (storage, start, sizes, steps, grad == 0x88, none)
        if storage.__class__ is StorageRef:
            if called != _ORDERED_DICT:
                self._require_no_hooks(none)
            made = self._view(storage, storage.dtype, start, sizes, steps, grad == 0x88)
        else:
            made = self._reduce(_REBUILD, args)
        memo += (name, storage_id, sizes, steps, none, args, made)
        return made

    def _remember(self, number: int, value: Any) -> None:
        """Put a value into the memo."""
        memo = self.memo
        if number == len(memo) and not self.memo_by_number:
            memo.append(value)
        elif 0 <= number < len(memo):
            memo[number] = value
        else:
            self.memo_by_number[number] = value

    def _remembered(self, number: int) -> Any:
        """What the memo has under a number. Raises KeyError where that is nothing."""
        return self.memo[number] if 0 <= number < len(self.memo) else self.memo_by_number[number]

    def _step(self, name: str, arg: Any) -> None:
        """One opcode that is not among the commonest."""
        stack = self.stack
        match name:
            case "PROTO":
                pass
            case "POP":
                if not stack and self.below:
                    self._to_mark()
                else:
                    stack.pop()
            case "POP_MARK":
                self._to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "BININT" | "LONG1" | "LONG4" | "BINFLOAT":
                if isinstance(arg, int) and (bits := (arg if arg >= 0 else ~arg).bit_length()) > _INTEGER_BITS:
                    raise FileFormatError(
                        f"{self.where} holds an integer of {bits // 8 + 1:,} bytes",
                        f"PyTorch reads none of more than {_INTEGER_BITS // 8 + 1}",
                    )
                stack.append(arg)
            case "INT":
                stack.append({b"00": False, b"01": True}[arg] if arg in (b"00", b"01") else self._decimal(arg))
            case "LONG":
                stack.append(self._decimal(arg.removesuffix(b"L")))
            case "FLOAT":
                if not _FLOAT.fullmatch(arg):
                    raise FileFormatError(f"{self.where} is damaged: {arg[:40]!r} is no number")
                stack.append(float(arg))
            case "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(arg)
            case "UNICODE":
                stack.append(str(arg, "raw-unicode-escape"))
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(arg)
            case "BYTEARRAY8":
                stack.append(self._object(Global("builtins", "bytearray"), (bytes(arg),)))
            case "SHORT_BINSTRING" | "BINSTRING":
                # `pickletools` gives the bytes as Latin-1; what they mean is the reader's choice.
                stack.append(arg.encode("latin-1").decode(self.encoding))
            case "STRING":
                if len(arg) < 2 or arg[:1] != arg[-1:] or arg[:1] not in (b"'", b'"'):
                    raise FileFormatError(f"{self.where} is damaged: a text without quotes")
                stack.append(codecs.escape_decode(arg[1:-1])[0].decode(self.encoding))
            case "EMPTY_LIST":
                self.budget.spend(_CONTAINER)
                stack.append([])
            case "EMPTY_DICT":
                self.budget.spend(_CONTAINER)
                stack.append({})
            case "EMPTY_SET":
                stack.append(self._object(Global("builtins", "set"), (), "set"))
            case "LIST":
                made = self._to_mark()
                self.stack.append(made)
            case "DICT":
                items = self._to_mark()
                self.stack.append({})
                self._set_items(items)
            case "FROZENSET":
                members = self._to_mark()
                self.stack.append(self._object(self._global("builtins", "frozenset"), (members,)))
            case "ADDITEMS":
                added = self._to_mark()
                self._add(added)
            case "APPEND":
                value = stack.pop()
                self._append([value])
            case "APPENDS":
                values = self._to_mark()
                self._append(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                items = self._to_mark()
                self._set_items(items)
            case "PUT":
                self._remember(self._decimal(arg), stack[-1])
            case "MEMOIZE":
                self._remember(len(self.memo) + len(self.memo_by_number), stack[-1])
            case "GET":
                stack.append(self._remembered(self._decimal(arg)))
            case "GLOBAL":
                module, attribute = arg
                stack.append(self._global(module.decode(), attribute.decode()))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._global(module, attribute))
            case "NEWOBJ":
                args, kind = stack.pop(), stack.pop()
                stack.append(self._new(kind, args))
            case "NEWOBJ_EX":
                kwargs, args, kind = stack.pop(), stack.pop(), stack.pop()
                if not isinstance(kind, Global) or kind.dotted in HARMLESS:
                    raise FileFormatError(f"{self.where}: keyword arguments are given to {_described(kind)}")
                stack.append(self._object(kind, (args, kwargs), "newobj_ex"))
            case "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            case _:
                raise FileFormatError(f"{self.where}: opcode {name} is not one that torch.save writes")

    def _decimal(self, text: bytes) -> int:
        if not _DECIMAL.fullmatch(text):
            raise FileFormatError(f"{self.where} is damaged: {text[:40]!r} is no whole number")
        return int(text)

    def _to_mark(self) -> list[Any]:
        """What lies above the last mark, which is taken away with it."""
        if not self.below:
            raise FileFormatError(f"{self.where} is damaged: a mark is missing")
        values = self.stack
        self.stack = self.below.pop()
        return values

    def _append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
            return
        self._require_foreign(target, "values are appended to")
        target.appended.extend(values)

    def _add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Opaque) or target.how != "set":
            self._require_foreign(target, "values are added to")
        target.appended.extend(values)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = self._pairs(items, target)
        if isinstance(target, dict):
            target.update(pairs)
            return
        if not _is_counter(target):
            self._require_foreign(target, "items are set on")
        target.items.extend(pairs)

    def _require_foreign(self, target: Any, done: str) -> None:
        """Raise FileFormatError where something is done to a value that torch knows, and would make another of it.

        What foreign code makes is nothing here but what it is made from.
        """
        if not isinstance(target, Opaque) or (isinstance(target.call, Global) and target.call.dotted in HARMLESS):
            raise FileFormatError(f"{self.where}: {done} {_described(target)}, which torch.save never writes")

    def _pairs(self, items: list[Any], target: Any) -> list[tuple[Any, Any]]:
        """Keys and values to be put into `target`."""
        pairs = list(zip(items[::2], items[1::2], strict=True))
        for key, _ in pairs:
            if type(key) is not str and not (type(key) is int and -(2**60) < key < 2**60):
                self._pay_for_key(key, target)
        return pairs

    def _pay_for_key(self, key: Any, target: Any) -> None:
        """A dict must not take ages. Where a file can choose a key's hash, each of many equal ones meets all others.

        A tuple is hashed again, and compared item by item, whenever it is used.
        """
        length = 1
        if isinstance(key, tuple):
            length += len(key)
            self.budget.spend(length)
            if any(isinstance(part, tuple) for part in key):
                raise ValueError("a key is a tuple of tuples")
        place = id(target), hash(key)
        self.chosen_hashes[place] += 1
        self.budget.spend(length * self.chosen_hashes[place])

    def _global(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise FileFormatError(f"{self.where} is damaged: the name of a class is no text")
        found = Global(module, name)
        if found.dotted not in HARMLESS and found.dotted not in self.calls:
            limits.check_name(found.dotted, self.where)
            self.foreign[found.dotted] = None
        return found

    def _storage(self, persistent_id: Any) -> Any:
        """The storage that a persistent id names; before 1.6 a module's class came with its source, too."""
        if not isinstance(persistent_id, tuple):
            raise FileFormatError(f"{self.where} is damaged: a persistent id is no tuple")
        if persistent_id[0] == "module" and isinstance(persistent_id[1], Global):
            return persistent_id[1]
        # A name for all that is behind these would copy it, and a file may have a long one in many places.
        kind, storage_class, key, location, count = persistent_id[:5]
        view = persistent_id[5] if len(persistent_id) > 5 else None
        if (
            kind != "storage"
            or not isinstance(storage_class, Global)
            or not isinstance(key, str)
            or "\0" in key
            or type(count) is not int
            or count < 0
            or len(persistent_id) > 6
        ):
            raise FileFormatError(f"{self.where} is damaged: a persistent id is not that of a storage")
        is_meta = location != "cpu" and self._is_meta(location)
        found = self.storages.get(key)
        dtype = _STORAGE_DTYPES.get(storage_class.name)
        if found is None:
            if dtype is None and storage_class.name != "UntypedStorage":
                raise FileFormatError(f"{self.where}: unknown storage class {storage_class.dotted}")
            found = self.storages[key] = StorageRef(self.span_of(key, dtype), dtype, count, is_meta=is_meta)
            if self.exact and found.span.nbytes != count * found.item:
                raise FileFormatError(
                    f"{self.where} is damaged: storage {key!r} should have {count * found.item:,} bytes, "
                    f"and has {found.span.nbytes:,}"
                )
        elif found.dtype != dtype:
            raise FileFormatError(f"{self.where} is damaged: storage {key!r} has two dtypes")
        elif (found.count, found.is_meta) != (count, is_meta):
            raise FileFormatError(f"{self.where} is damaged: storage {key!r} has two sizes or places")
        if self.views and key in self.views:
            raise FileFormatError(f"{self.where} is damaged: {key!r} is a storage and a part of one")
        return found if view is None else self._part(key, found, view)

    def _is_meta(self, location: Any) -> bool:
        """Whether a storage was on the meta device when it was saved, where nothing has values."""
        if location == "meta":
            return True
        if not isinstance(location, str) or not _LOCATION.fullmatch(location):
            raise FileFormatError(f"{self.where}: a storage was on no device that torch knows: {location!r:.40}")
        return False

    def _part(self, key: str, found: StorageRef, view: Any) -> StorageRef:
        """A part of a storage that torch before 0.4 took for a storage itself: its own key, its offset and size."""
        own, offset, size = view
        if not isinstance(own, str) or type(offset) is not int or type(size) is not int or min(offset, size) < 0:
            raise FileFormatError(f"{self.where} is damaged: a part of storage {key!r} is none")
        part = StorageRef(found.span, found.dtype, size, offset, found.is_meta)
        if own in self.storages or self.views.setdefault(own, (key, part)) != (key, part):
            raise FileFormatError(f"{self.where} is damaged: two storages have the key {own!r}")
        return self.views[own][1]

    def _reduce(self, function: Any, args: Any) -> Any:
        name = function.dotted if isinstance(function, Global) else ""
        if not isinstance(args, tuple):
            raise FileFormatError(f"{self.where} is damaged: {_described(function)} is called with no tuple")
        if name in self.calls:
            made = self.calls[name](args)
            if made is not None:
                return made
            self.foreign[name] = None
        if name not in _MADE:
            if name in _GETATTR:
                self._judge_getattr(name, args)
            return self._object(function, args)
        match name, args:
            case "torch.nn.parameter.Parameter", (data,):
                return self._parameter(data, grad=True)
            case "torch.nn.parameter.Parameter", (data, bool() as grad):
                return self._parameter(data, grad=grad)
            case "torch._utils._rebuild_parameter", (data, bool() as grad, hooks):
                self._require_no_hooks(hooks)
                return self._parameter(data, grad=grad)
            case "torch._utils._rebuild_parameter_with_state", (data, bool() as grad, hooks, state):
                self._require_no_hooks(hooks)
                self._set_attributes(state)
                return self._parameter(data, grad=grad)
            case "collections.OrderedDict", ():
                self.budget.spend(_CONTAINER)
                return OrderedDict()
            case "collections.OrderedDict", (list() as pairs,):
                self.budget.spend(_ITEM * len(pairs))
                made = OrderedDict()
                made.update(self._pairs([part for pair in pairs for part in _pair(pair)], made))
                return made
            # A name for the rest would copy it, and a file may have long arguments in many places.
            case "torch._utils._rebuild_tensor_v2", (StorageRef() as storage, offset, shape, stride, grad, hooks, *_):
                if len(args) <= 7:
                    self._require_no_hooks(hooks)
                    return self._tensor(storage, storage.dtype, offset, shape, stride, grad, *args[6:])
            case "torch._utils._rebuild_tensor", (StorageRef() as storage, offset, shape, stride):
                return self._tensor(storage, storage.dtype, offset, shape, stride, False)
            case "torch._utils._rebuild_tensor_v3", (
                StorageRef() as storage,
                offset,
                shape,
                stride,
                grad,
                hooks,
                Global(module="torch", name=dtype),
                *_,
            ):
                if len(args) <= 8:
                    self._require_no_hooks(hooks)
                    return self._tensor(storage, dtype, offset, shape, stride, grad, *args[7:])
            case "torch._utils._rebuild_device_tensor_from_cpu_tensor", (
                TensorEntry() as tensor,
                Global(module="torch", name=dtype),
                device,
                bool() as grad,
            ) if dtype == tensor.dtype:
                if self._is_meta(device):
                    return self._without_values(tensor.dtype, tensor.shape, tensor.stride, grad)
                return self._flagged(tensor, grad)
            case "torch._tensor._rebuild_from_type_v2", (Global() as inner, Global() as kind, tuple() as inside, state):
                self.budget.spend(_CONTAINER)
                return self._of_class(function, kind, self._reduce(inner, inside), args, state)
        raise FileFormatError(f"{self.where}: {name} is called with arguments that torch.save never gives it")

    def _require_no_hooks(self, hooks: Any) -> None:
        """Raise FileFormatError for hooks of a tensor: torch runs what is there, and torch.save writes none."""
        if not (hooks is None or (isinstance(hooks, dict) and not hooks)):
            raise FileFormatError(f"{self.where}: a tensor has hooks, which torch.save never writes")

    def _new(self, kind: Any, args: Any) -> Any:
        """What `kind.__new__(kind, *args)` gives."""
        if not isinstance(args, tuple):
            raise FileFormatError(f"{self.where} is damaged: {_described(kind)} is called with no tuple")
        match kind:
            case Global(module="collections", name="OrderedDict"):
                self.budget.spend(_CONTAINER)
                return OrderedDict()  # which only `__init__` would fill
            case Global() if kind.dotted == PARAMETER:
                return self._reduce(kind, args)
        return self._object(kind, args, "newobj")

    def _parameter(self, data: Any, *, grad: bool) -> Any:
        """A tensor as a parameter; of what is no view of a storage, the call that makes it one."""
        if isinstance(data, TensorEntry):
            return replace(self._flagged(data, grad), is_parameter=True)
        if not isinstance(data, Opaque):
            raise FileFormatError(f"{self.where}: {_described(data)} is made a parameter, and is no tensor")
        return self._object(_REBUILD_PARAMETER, (data, grad, OrderedDict()))

    def _flagged(self, tensor: TensorEntry, grad: bool) -> TensorEntry:
        if grad and not is_differentiable(tensor.dtype):
            raise FileFormatError(f"{self.where}: a tensor of dtype {tensor.dtype} is trained, which torch does not do")
        return replace(tensor, requires_grad=grad)

    def _of_class(self, function: Global, kind: Global, made: Any, args: tuple[Any, ...], state: Any) -> Any:
        """A tensor with attributes of its own, or of a class of its own: they are none of a state dict's."""
        known = len(self.attributes)
        self._set_attributes(state)
        if isinstance(made, TensorEntry):
            return replace(made, is_parameter=True) if kind.dotted == PARAMETER else made
        if not isinstance(made, Opaque):
            raise FileFormatError(f"{self.where}: {_described(made)} is made a tensor of {kind.dotted}, and is none")
        if isinstance(made.call, Global) and made.call.name == "_rebuild_wrapper_subclass":
            del self.attributes[known:]  # its values are in them: they are its parts
            return self._object(function, args)
        return made

    def _set_attributes(self, state: Any) -> None:
        """Note the attributes that a tensor gets: `state`, or the two of a class with slots.

        Raises FileFormatError where one of them makes it another tensor.
        """
        parts = state if isinstance(state, tuple) else (state, None)
        if len(parts) != 2 or not all(part is None or isinstance(part, dict) for part in parts):
            raise FileFormatError(f"{self.where}: a tensor has attributes that are none")
        for part in parts:
            self.budget.spend(_ITEM * len(part or ()))
            for name, value in (part or {}).items():
                if not isinstance(name, str) or name in TENSOR_PROPERTIES or name.startswith("__"):
                    raise FileFormatError(
                        f"{self.where}: the attribute {name!r:.40} of a tensor is set, which makes it another tensor",
                        "load it with torch, and save a state dict of tensor.detach().clone()",
                    )
                self.attributes.append((name, value))

    def _without_values(self, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], grad: bool) -> Opaque:
        """A tensor on the meta device."""
        return self._object(_REBUILD_META, (Global("torch", dtype), shape, stride, grad))

    def _judge_getattr(self, name: str, args: Any) -> None:
        """`getattr` is foreign, unless all that it is called for are members of enums, by their names."""
        match args:
            case Global() as kind, str() as member if kind.dotted in _ENUMS and member in _MEMBERS:
                if not self.getattr_misused:
                    self.foreign.pop(name, None)
            case _:
                self.getattr_misused = True
                self.foreign[name] = None

    def _object(self, call: Any, args: Any, how: str = "reduce") -> Opaque:
        """A call, kept as it is. What torch would call at once must not change with a list that is changed later."""
        self.budget.spend(_CONTAINER)
        if not isinstance(call, Global):
            # What is called was made by another call: no name says what it is.
            made_by = call.call if isinstance(call, Opaque) else None
            self.foreign[made_by.dotted if isinstance(made_by, Global) else "a call"] = None
        elif call.dotted in HARMLESS:
            args = self._settled(args, 3)
        return Opaque(call, args, how=how)

    def _settled(self, value: Any, depth: int) -> Any:
        """Arguments with copies of the lists in them, so many levels down."""
        if not isinstance(value, list | tuple) or not depth:
            return value
        self.budget.spend(len(value))
        if not _SEQUENCES.isdisjoint(map(type, value)):
            return type(value)([self._settled(item, depth - 1) for item in value])
        return list(value) if isinstance(value, list) else value

    def _tensor(
        self,
        storage: StorageRef,
        dtype: str | None,
        offset: Any,
        shape: Any,
        stride: Any,
        grad: Any,
        marks: Any = None,
    ) -> TensorEntry | Opaque:
        if dtype is None or dtype not in ITEM_BYTES or type(offset) is not int or offset < 0:
            raise FileFormatError(f"{self.where}: a tensor of dtype {dtype} at no offset that there can be")
        if type(grad) is not bool:
            raise FileFormatError(f"{self.where} is damaged: requires_grad of a tensor is {_described(grad)}")
        # Only numbers may be looked up by: a file can make tuples that no hash of them ends.
        sizes, steps = shapes.sizes(sizes_in(shape), self.where), shapes.sizes(sizes_in(stride), self.where)
        made = self._view(storage, dtype, offset, sizes, steps, grad)
        return self._marked(made, marks) if marks and isinstance(made, TensorEntry) else made

    def _marked(self, tensor: TensorEntry, marks: Any) -> TensorEntry:
        """A tensor that is conjugated or negated when it is read: a mark counts that is there, whatever its value."""
        if not isinstance(marks, dict) or not all(isinstance(name, str) for name in marks):
            raise FileFormatError(f"{self.where} is damaged: the marks of a tensor are none")
        conj, neg = "conj" in marks, "neg" in marks
        if conj and "complex" not in tensor.dtype:
            raise FileFormatError(f"{self.where}: a tensor of dtype {tensor.dtype} is conjugated")
        # Two tensors that share a storage and its marks stay tied.
        key = id(tensor.storage), tensor.dtype, conj, neg
        if key not in self.resolved:
            from modelcli.checkpoints.torch_pickle.conj_and_neg import resolved

            self.resolved[key] = resolved(tensor.storage, tensor.dtype, conj=conj, neg=neg)
        return replace(tensor, storage=self.resolved[key])

    def _view(
        self,
        storage: StorageRef,
        dtype: str | None,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        grad: bool,
    ) -> TensorEntry | Opaque:
        last = self.extents.get((shape, stride))
        if last is None:
            last = self.extents[shape, stride] = self._extent(shape, stride)
        if dtype is None:
            raise FileFormatError(f"{self.where}: a tensor of shape {shape} in a storage without a dtype")
        # Nearly all are plain: the bytes that they need are there, and nothing else has to be looked at.
        plain = dtype == storage.dtype and not (storage.offset or storage.is_meta or grad) and dtype in _PLAIN_DTYPES
        if plain and 0 <= offset <= storage.count - last and storage.count * ITEM_BYTES[dtype] <= storage.span.nbytes:
            return TensorEntry(shape, dtype, stride, offset, storage.span, grad)
        if dtype.startswith("q"):
            raise FileFormatError(f"{self.where}: a quantized tensor of dtype {dtype} without a scale")
        item = ITEM_BYTES[dtype]
        needed = (offset + last) * item if last else 0
        start = storage.offset * storage.item
        room = min(storage.count * storage.item, storage.span.nbytes - start)
        if needed > room:
            name = self.stack[-1] if self.stack and isinstance(self.stack[-1], str) else "a tensor"
            raise FileFormatError(
                f"{self.where}: {name} of shape {list(shape)} needs {needed:,} bytes, and its record holds {room:,}"
            )
        if start % item or offset < 0:
            raise FileFormatError(f"{self.where}: a tensor of dtype {dtype} starts inside an element")
        if grad and not is_differentiable(dtype):
            raise FileFormatError(f"{self.where}: a tensor of dtype {dtype} is trained, which torch does not do")
        if storage.is_meta:
            return self._without_values(dtype, shape, stride, grad)
        return TensorEntry(shape, dtype, stride, offset + start // item, storage.span, grad)

    def _extent(self, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
        """How many elements of a storage a view spans from its first to its last; 0 for an empty one."""
        last = shapes.extent(shapes.shape(shape, self.where), shapes.sizes(stride, self.where))
        if last >= 2**63:
            raise ValueError(f"a tensor of more elements than there can be: shape {list(shape)}")
        return last

    def _build(self, target: Any, state: Any) -> None:
        """Give an object its state. A tensor's would make it another one, wherever it stands already."""
        match target, state:
            case OrderedDict(), dict():
                self.budget.spend(_ITEM * len(state))
                if (name := next((name for name in state if name in _DICT_ATTRIBUTES), None)) is not None:
                    raise FileFormatError(
                        f"{self.where}: the attribute {name!r} of a dict is set, by which programs read it",
                        "load it with torch, and save dict(state_dict)",
                    )
                target.state = {**(target.state or {}), **state}
            case TensorEntry(is_parameter=True), (bool() as grad, _, _):
                # As parameters were written before 0.4: whether it is trained, and nothing else.
                object.__setattr__(target, "requires_grad", self._flagged(target, grad).requires_grad)
            case TensorEntry(), _:
                raise FileFormatError(
                    f"{self.where}: a tensor is given other numbers after it was made, which torch.save never does",
                    "load it with torch, and save its state dict again",
                )
            case _:
                if not _is_counter(target):
                    self._require_foreign(target, "a state is set on")
                if target.state is not None:
                    raise FileFormatError(f"{self.where}: a state is set twice on {_described(target)}")
                target.state = state


@functools.lru_cache(maxsize=10_000)
def _integers(text: bytes) -> tuple[int, ...]:
    """The numbers that a row of BININT1, BININT2 and BININT opcodes pushes; the others make a tuple of them."""
    found = []
    position = 0
    while position < len(text):
        width = _INT_BYTES.get(text[position], 0)
        if width:
            number = text[position + 1 : position + 1 + width]
            found.append(int.from_bytes(number, "little", signed=width == 4))
        position += 1 + width
    return tuple(found)


def _described(value: Any) -> str:
    if isinstance(value, Opaque):
        return f"what {_described(value.call)} made"
    return value.dotted if isinstance(value, Global) else type(value).__name__


def _is_counter(value: Any) -> bool:
    return isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted == _COUNTER


def _pair(value: Any) -> tuple[Any, Any]:
    key, item = value
    return key, item


def sizes_in(value: Any) -> Any:
    """What stands for a shape or a stride, `torch.Size` taken off."""
    if isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted == "torch.Size":
        (value,) = value.args
    return value

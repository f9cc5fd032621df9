"""Pickles as inert values: an interpreter of the opcodes that resolves no name and calls nothing.

What `torch.save` wrote comes back as plain Python values, `Tensor`s that point into storages, and `Opaque` objects
for everything else, which remember the name of their class and what it was made from.
"""

from __future__ import annotations

import io
import pickletools
import struct
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO

from modelcli.blueprint import ITEM_BYTES
from modelcli.errors import FileFormatError

MAX_OPCODES = 20_000_000
#: Well below Python's own limit on recursion, with two or three frames for each level.
MAX_DEPTH = 200
MAX_DIMENSIONS = 1_000


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. It is never looked up."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A persistent id: `key` names a record of the archive, `count` elements of `dtype` (None for raw bytes).

    `offset` is where it starts in that record, in elements: torch before 0.4 saved views of storages.
    """

    key: str
    dtype: str | None
    count: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view into a storage, with what `torch._utils._rebuild_tensor_v2` says of it."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    is_parameter: bool = False


@dataclass(eq=False)
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
}
#: The classes of torch's typed storages, by dtype.
STORAGE_CLASSES = {dtype: name for name, dtype in _STORAGE_DTYPES.items() if not dtype.startswith("q")}

#: What torch.load(weights_only=True) accepts as well, besides tensors: kept as it is, and harmless.
_HARMLESS = frozenset(
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
    }
)


@dataclass
class Pickle:
    """The value of a pickle, the names in it that are on no allow-list, and its storages by their keys."""

    value: Any
    foreign: tuple[str, ...]
    storages: dict[str, StorageRef]


_U4 = struct.Struct("<I")
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}


def read(data: bytes | BinaryIO, where: str) -> Pickle:
    """Interpret a pickle, or the next one of a stream, which then stands behind it; `where` names it.

    Raises FileFormatError where it is damaged or beyond a limit.
    """
    machine = _Machine(where)
    start = 0 if isinstance(data, bytes) else data.tell()
    text = data if isinstance(data, bytes) else data.read()
    try:
        value, end = machine.run(text)
    except FileFormatError:
        raise
    except Exception as error:
        raise FileFormatError(f"{where} is damaged: {error}") from None
    if not isinstance(data, bytes):
        data.seek(start + end)
    return Pickle(value, tuple(dict.fromkeys(machine.foreign)), machine.storages)


class _Machine:
    """The pickle virtual machine, with every construction inert."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.foreign: list[str] = []
        self.storages: dict[str, StorageRef] = {}

    def run(self, data: bytes) -> tuple[Any, int]:
        """The value of the pickle at the start of `data`, and where it ends.

        The opcodes that make up nearly all of a state dict are decoded here, the commonest first; `pickletools` knows
        the arguments of the others.
        """
        stack, memo, marks = self.stack, self.memo, self.marks
        position, count, stream = 0, 0, io.BytesIO(data)
        while True:
            code = data[position]
            position += 1
            count += 1
            if count > MAX_OPCODES:
                raise FileFormatError(f"{self.where}: more than {MAX_OPCODES:,} opcodes")
            if code == 0x72:  # LONG_BINPUT
                (number,) = _U4.unpack_from(data, position)
                memo[number] = stack[-1]
                position += 4
            elif code == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif code == 0x68:  # BINGET
                stack.append(memo[data[position]])
                position += 1
            elif code == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif code == 0x58:  # BINUNICODE
                (size,) = _U4.unpack_from(data, position)
                position += 4 + size
                if position > len(data):
                    raise FileFormatError(f"{self.where} is cut off inside a text of {size:,} bytes")
                stack.append(str(data[position - size : position], "utf-8", "surrogatepass"))
            elif code == 0x28:  # MARK
                marks.append(len(stack))
            elif code == 0x74:  # TUPLE
                stack.append(tuple(self._to_mark()))
            elif code == 0x51:  # BINPERSID
                stack.append(self._storage(stack.pop()))
            elif code == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif code == 0x52:  # REDUCE
                args, function = stack.pop(), stack.pop()
                stack.append(self._reduce(function, args))
            elif code == 0x89:  # NEWFALSE
                stack.append(False)
            elif code in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
                start = len(stack) - (code - 0x84)
                if start < 0:
                    raise FileFormatError(f"{self.where} is damaged: a tuple of more than there is")
                stack[start:] = [tuple(stack[start:])]
            elif code == 0x4D:  # BININT2
                stack.append(data[position] | data[position + 1] << 8)
                position += 2
            elif code == 0x6A:  # LONG_BINGET
                stack.append(memo[_U4.unpack_from(data, position)[0]])
                position += 4
            elif code == 0x2E:  # STOP
                return stack.pop(), position
            else:
                opcode = _OPCODES.get(code)
                if opcode is None:
                    raise FileFormatError(f"{self.where} is damaged: {code:#04x} is no opcode")
                arg = None
                if opcode.arg is not None:
                    stream.seek(position)
                    arg = opcode.arg.reader(stream)
                    position = stream.tell()
                self._step(opcode.name, arg)

    def _step(self, name: str, arg: Any) -> None:
        """One opcode that is not among the commonest."""
        stack, memo = self.stack, self.memo
        match name:
            case "PROTO" | "FRAME":
                pass
            case "POP":
                if self.marks and self.marks[-1] == len(stack):
                    self.marks.pop()
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
            case "BININT" | "LONG1" | "LONG4" | "INT" | "LONG" | "BINFLOAT" | "FLOAT":
                stack.append(arg)
            case "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE":
                stack.append(arg)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(arg)
            case "BYTEARRAY8":
                stack.append(Opaque(Global("builtins", "bytearray"), (bytes(arg),)))
            case "SHORT_BINSTRING" | "BINSTRING" | "STRING":
                stack.append(arg)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(Opaque(Global("builtins", "set"), (), how="set"))
            case "LIST":
                stack.append(self._to_mark())
            case "DICT":
                stack.append(dict(_pairs(self._to_mark())))
            case "FROZENSET":
                stack.append(Opaque(self._global("builtins", "frozenset"), (self._to_mark(),)))
            case "ADDITEMS":
                added = self._to_mark()
                stack[-1].appended.extend(added)
            case "APPEND":
                value = stack.pop()
                self._append([value])
            case "APPENDS":
                self._append(self._to_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._to_mark())
            case "PUT":
                memo[int(arg)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET":
                stack.append(memo[int(arg)])
            case "GLOBAL":
                module, _, attribute = arg.partition(" ")
                stack.append(self._global(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._global(module, attribute))
            case "NEWOBJ":
                args, kind = stack.pop(), stack.pop()
                stack.append(Opaque(kind, args, how="newobj"))
            case "NEWOBJ_EX":
                kwargs, args, kind = stack.pop(), stack.pop(), stack.pop()
                stack.append(Opaque(kind, (args, kwargs), how="newobj_ex"))
            case "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            case _:
                raise FileFormatError(f"{self.where}: opcode {name} is not one that torch.save writes")

    def _to_mark(self) -> list[Any]:
        if not self.marks:
            raise FileFormatError(f"{self.where} is damaged: a mark is missing")
        position = self.marks.pop()
        values = self.stack[position:]
        del self.stack[position:]
        return values

    def _append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        else:
            target.appended.extend(values)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = _pairs(items)
        if isinstance(target, dict):
            target.update(pairs)
        else:
            target.items.extend(pairs)

    def _global(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise FileFormatError(f"{self.where} is damaged: the name of a class is no text")
        found = Global(module, name)
        if found.dotted not in _HARMLESS:
            self.foreign.append(found.dotted)
        return found

    def _storage(self, persistent_id: Any) -> Any:
        """The storage that a persistent id names; before 1.6 a module's class came with its source, too."""
        kind, storage_class, *rest = persistent_id
        if kind == "module" and isinstance(storage_class, Global):
            return storage_class
        key, _location, count, *view = rest
        if (
            kind != "storage"
            or not isinstance(storage_class, Global)
            or not isinstance(key, str)
            or not isinstance(count, int)
            or count < 0
        ):
            raise FileFormatError(f"{self.where} is damaged: a persistent id is not that of a storage")
        dtype = _STORAGE_DTYPES.get(storage_class.name)
        if dtype is None and storage_class.name != "UntypedStorage":
            raise FileFormatError(f"{self.where}: unknown storage class {storage_class.dotted}")
        found = StorageRef(key, dtype, count)
        if self.storages.setdefault(key, found).dtype != dtype:
            raise FileFormatError(f"{self.where} is damaged: storage {key!r} has two dtypes")
        if view and view[0] is not None:
            _, offset, size = view[0]
            return StorageRef(key, dtype, int(size), int(offset))
        return found

    def _reduce(self, function: Any, args: Any) -> Any:
        name = function.dotted if isinstance(function, Global) else ""
        match name, args:
            case "collections.OrderedDict", ():
                return OrderedDict()
            case "collections.OrderedDict", (list() as pairs,):
                return OrderedDict(_pairs([part for pair in pairs for part in _pair(pair)]))
            case "torch._utils._rebuild_tensor_v2", (
                StorageRef() as storage,
                offset,
                shape,
                stride,
                grad,
                _hooks,
                *metadata,
            ):
                if any(isinstance(bits, dict) and (bits.get("conj") or bits.get("neg")) for bits in metadata):
                    raise FileFormatError(
                        f"{self.where}: a tensor that is conjugated or negated only when it is read",
                        "save tensor.resolve_conj().resolve_neg() instead",
                    )
                return self._tensor(storage, storage.dtype, offset, shape, stride, grad)
            case "torch._utils._rebuild_tensor", (StorageRef() as storage, offset, shape, stride):
                return self._tensor(storage, storage.dtype, offset, shape, stride, False)
            case "torch._tensor._rebuild_from_type_v2", (
                Global() as inner,
                Global(module="torch", name="Tensor") | Global(module="torch.nn.parameter", name="Parameter"),
                tuple() as inner_args,
                _state,
            ):
                # A tensor with attributes of its own: they are none of a state dict's.
                return self._reduce(inner, inner_args)
            case "torch._utils._rebuild_tensor_v3", (
                StorageRef() as storage,
                offset,
                shape,
                stride,
                grad,
                _hooks,
                Global(module="torch", name=dtype),
                *_,
            ):
                return self._tensor(storage, dtype, offset, shape, stride, grad)
            case (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                (Tensor() as tensor, grad, *_),
            ):
                return Tensor(
                    tensor.storage, tensor.dtype, tensor.offset, tensor.shape, tensor.stride, bool(grad), True
                )
        return Opaque(function, args)

    def _tensor(
        self, storage: StorageRef, dtype: str | None, offset: Any, shape: Any, stride: Any, grad: Any
    ) -> Tensor:
        shape, stride = _sizes(shape), _sizes(stride)
        if (
            dtype is None
            or dtype not in ITEM_BYTES
            or len(shape) != len(stride)
            or not isinstance(offset, int)
            or offset < 0
        ):
            raise FileFormatError(f"{self.where}: a tensor of dtype {dtype}, shape {shape}, stride {stride}")
        if min((*shape, *stride), default=0) < 0:
            raise FileFormatError(f"{self.where}: a tensor of negative size: shape {shape}, stride {stride}")
        if max(prod(size or 1 for size in shape), *stride, offset) >= 2**63:
            raise FileFormatError(f"{self.where}: a tensor of more elements than there can be: shape {shape}")
        return Tensor(storage, dtype, storage.offset + offset, shape, stride, bool(grad))

    def _build(self, target: Any, state: Any) -> None:
        if (isinstance(target, OrderedDict) and isinstance(state, dict)) or isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, Tensor):
            raise FileFormatError(f"{self.where}: a state is set on {type(target).__name__}")


def _pair(value: Any) -> tuple[Any, Any]:
    key, item = value
    return key, item


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted == "torch.Size":
        value = value.args[0]
    if not isinstance(value, tuple) or not all(type(size) is int for size in value):
        raise ValueError("what should be a shape is none")
    if len(value) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(value):,} dimensions")
    return value


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    """Keys and values. A key of tuples in tuples is refused: a short pickle can make one that takes ages to hash."""
    pairs = list(zip(items[::2], items[1::2], strict=True))
    for key, _ in pairs:
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise ValueError("a key is a tuple of tuples")
    return pairs

"""Read pickles without running them: an interpreter of the opcodes that imports no class and calls no function.

The result consists of plain Python values, a `TensorEntry` for each tensor, and an `Opaque` for any other object, which
keeps the name of its class and the arguments it was made from. `value_builder` makes these values.
"""

from __future__ import annotations

import codecs
import functools
import io
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from modelcli.checkpoints import limits
from modelcli.checkpoints.storage import Storage
from modelcli.checkpoints.torch_pickle.allow_list import HARMLESS
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef, described
from modelcli.checkpoints.torch_pickle.value_builder import CONTAINER, Call, SpanOf, ValueBuilder, is_counter
from modelcli.errors import FileFormatError, ModelcliError


@dataclass(frozen=True)
class Pickle:
    """The content of a pickle.

    Attributes:
        value: its value.
        foreign: the names of classes and functions in it that are not on the allow-list.
        budget: what the file may still describe.
        attributes: names and values of the attributes that it sets on tensors; a state dict does not load these.
    """

    value: Any
    foreign: tuple[str, ...]
    budget: limits.Budget
    attributes: tuple[tuple[str, Any], ...] = ()


#: The numbers that Python's pickler writes as text. Python's two readers disagree about others: one reads `010` as 8.
_DECIMAL = re.compile(rb"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(rb"-?(?:[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?|inf)|nan", re.IGNORECASE)
#: A position after the end of any pickle.
_NO_FRAME = 1 << 63
#: The opcodes whose argument is a line of text.
_LINES = frozenset(b"cIFLSVgp")

_U4 = struct.Struct("<I")
#: The most bits of an integer that `torch.load(weights_only=True)` reads: LONG1 states the length in a single byte.
_INTEGER_BITS = 255 * 8 - 1
#: Other opcodes of state dicts, which `_Machine.run` does not decode itself: their names, and how to read the argument.
#: `pickletools` knows all others, but importing it takes longer than reading a file.
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
_ORDERED_DICT = Global("collections", "OrderedDict")
_INT_BYTES = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
_INT = rb"(?:K.|M..|J.{4})"
_SIZES = rb"%(i)s\x85|%(i)s{2}\x86|%(i)s{3}\x87|\(%(i)s{4,64}t" % {b"i": _INT}
#: What torch.save writes for a tensor, from after `_rebuild_tensor_v2` to its last opcode, once the memo has more than
#: 256 entries: a storage with its class, key, location and size (and before 1.6 None, for a whole storage); the offset,
#: shape and stride (not empty); requires_grad; no hooks. Each value is put into the memo.
_TENSOR = re.compile(
    rb"\(\((h.h.X.{4})([0-9]{1,20})(r.{4}h.)(%(i)s)(N?)(tr.{4}Q)"
    rb"(%(i)s)(%(s)s)(r.{4})(%(s)s)(r.{4}[\x88\x89]h.\)Rr.{4}tr.{4}Rr.{4})" % {b"i": _INT, b"s": _SIZES},
    re.DOTALL,
)
#: The least number of opcodes that it matches; each makes a value, or puts one into the memo.
_TENSOR_OPCODES = 30
#: The bytes between its texts and numbers. They contain the number of each value in the memo.
_BEFORE_KEY = struct.Struct("<xBxBxI")
_BEHIND_KEY = struct.Struct("<xIxB")
_BEHIND_ID = struct.Struct("<2xIx")
_BEHIND_SHAPE = struct.Struct("<xI")
_BEHIND_STRIDE = struct.Struct("<xIBxB3xI2xI2xI")
#: The number of opcodes between two checks of the limits.
_BLOCK = 65_536
#: Each byte may be used twice: to make a value, and to process it, such as to make a module and to name it.
_TIMES = 2


def _no_storages(key: str, _dtype: str | None) -> Storage:
    raise FileFormatError(f"the file contains storage {key!r} in a part that cannot have storages")


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
    """Interpret a pickle, and return its content.

    Args:
        data: the pickle, or a stream. After the call the position of the stream is after the pickle.
        where: the name of the pickle in error messages.
        span_of: returns the bytes of a storage.
        budget: what the file may still describe; a pickle that is not part of a larger file gets its own.
        exact: whether each storage must have exactly the bytes that its elements need.
        encoding: the encoding of texts that Python 2 wrote as bytes; torch assumes UTF-8.
        calls: functions by the name of a foreign function. Each gets the arguments and returns a value, or None to
            treat the call as foreign.

    Raises:
        FileFormatError: the pickle is damaged, exceeds a limit, or is one that Python's own readers understand in
            different ways.
    """
    start = 0 if isinstance(data, bytes) else data.tell()
    text = data if isinstance(data, bytes) else data.read()
    budget = budget or limits.Budget(where, 0, _TIMES)
    budget.earn(len(text))
    values = ValueBuilder(where, span_of, budget, exact=exact, calls=calls or {})
    machine = _Machine(where, values, encoding)
    try:
        value, end = machine.run(text)
    except ModelcliError:
        raise
    except Exception as error:
        raise FileFormatError.damaged(where, str(error)) from None
    if not isinstance(data, bytes):
        data.seek(start + end)
    return Pickle(value, tuple(values.foreign), budget, tuple(values.attributes))


def _opcode(code: int, where: str) -> tuple[str, struct.Struct | Callable[[Any], Any] | None]:
    """Return the name of an opcode, and what reads its argument (None if it has no argument)."""
    if (found := _USUAL.get(code)) is not None:
        return found
    name, read = _unusual().get(code, ("", None))
    if not name:
        raise FileFormatError.damaged(where, f"it contains byte {code:#04x}, which is not a pickle opcode")
    return name, read


@functools.cache
def _unusual() -> dict[int, tuple[str, Callable[[Any], Any] | None]]:
    import pickletools

    return {
        ord(opcode.code): (opcode.name, None if opcode.arg is None else opcode.arg.reader)
        for opcode in pickletools.opcodes
    }


class _Machine:
    """The stack machine that runs the opcodes; `ValueBuilder` makes the values."""

    def __init__(self, where: str, values: ValueBuilder, encoding: str) -> None:
        self.where = where
        self.encoding = encoding
        #: The values above the last mark, which are all that an opcode may use, and the values below each mark.
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        #: The memo entries 0, 1, 2 and so on, as nearly every pickler numbers them: a list of a million entries takes a
        #: tenth of the memory of a dict. After a gap in the numbers, further entries go to `memo_by_number`.
        self.memo: list[Any] = []
        self.memo_by_number: dict[int, Any] = {}
        self.values = values
        values.last_text = self._last_text

    def _last_text(self) -> str | None:
        return self.stack[-1] if self.stack and isinstance(self.stack[-1], str) else None

    def run(self, data: bytes) -> tuple[Any, int]:
        """Return the value of the pickle at the start of `data`, and the position after it.

        This function decodes the opcodes that make up nearly all of a state dict, the most frequent first;
        `pickletools` decodes the others.
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
                    if (
                        position > frame_end
                    ):  # Python's reader drops the first part of an argument that a frame's end cuts
                        raise FileFormatError.damaged(
                            self.where, f"a frame ends inside an opcode, at byte {frame_end:,}"
                        )
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
                elif code == 0x8A:  # LONG1
                    end = position + 1 + data[position]
                    if end > len(data):
                        raise ValueError("not enough data in stream to read long1")
                    stack.append(int.from_bytes(data[position + 1 : end], "little", signed=True))
                    position = end
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
                        raise FileFormatError.damaged(self.where, f"it ends inside a text of {size:,} bytes")
                    nodes += 1
                    stack.append(str(data[position - size : position], "utf-8", "surrogatepass"))
                elif code == 0x52:  # REDUCE
                    nodes += 1
                    args, function = stack.pop(), stack.pop()
                    stack.append(self.values.reduce(function, args))
                elif code == 0x51:  # BINPERSID
                    nodes += 1
                    stack.append(self.values.storage(stack.pop()))
                elif code == 0x29:  # EMPTY_TUPLE
                    stack.append(())
                elif code == 0x89:  # NEWFALSE
                    stack.append(False)
                elif 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                    start = len(stack) - (code - 0x84)
                    if start < 0:
                        raise FileFormatError.damaged(
                            self.where, "a tuple needs more items than the pickle's stack has"
                        )
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
                        raise FileFormatError.damaged(
                            self.where, f"a frame does not end with the pickle, at byte {position:,}"
                        )
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
                            raise FileFormatError.damaged(
                                self.where, f"a frame of {arg:,} bytes is longer than the rest of it"
                            )
                        frame_end = position + arg
                        continue
                    self._step(name, arg)
                    stack = self.stack
            limits.NODES.check(nodes, self.where)
        raise limits.OPCODES.exceeded(self.where, f"more than {limits.OPCODES.value:,} opcodes")

    def _saved_tensor(self, found: re.Match[bytes]) -> Any:
        """Carry out all opcodes that `_TENSOR` matched, so that a whole tensor takes one step instead of thirty.

        Returns the tensor, or None, and then has done nothing, if the memo numbers are not consecutive. The opcodes
        then have to run one by one, because a later one may read what an earlier one has put into the memo.
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
            raise FileFormatError.damaged(
                self.where, f"the key {key!r} of a storage is not {length} bytes long as stated"
            )
        name, sizes, steps = key.decode(), _integers(shape), _integers(stride)
        storage_id: tuple[Any, ...] = (memo[word], memo[kind], name, memo[place], _integers(count)[0])
        if whole:
            storage_id = (*storage_id, None)
        storage = self.values.storage(storage_id)
        start, called = _integers(offset)[0], memo[hooks]
        none = OrderedDict() if called == _ORDERED_DICT else self.values.reduce(called, ())
        args = (storage, start, sizes, steps, grad == 0x88, none)
        if storage.__class__ is StorageRef:
            if called != _ORDERED_DICT:
                self.values.require_no_hooks(none)
            made = self.values.view(storage, storage.dtype, start, sizes, steps, grad == 0x88)
        else:
            made = self.values.reduce(_REBUILD, args)
        memo += (name, storage_id, sizes, steps, none, args, made)
        return made

    def _remember(self, number: int, value: Any) -> None:
        """Put a value into the memo under a number."""
        memo = self.memo
        if number == len(memo) and not self.memo_by_number:
            memo.append(value)
        elif 0 <= number < len(memo):
            memo[number] = value
        else:
            self.memo_by_number[number] = value

    def _remembered(self, number: int) -> Any:
        """Return the memo entry of a number. Raises KeyError if there is none."""
        return self.memo[number] if 0 <= number < len(self.memo) else self.memo_by_number[number]

    def _step(self, name: str, arg: Any) -> None:
        """Run one of the less frequent opcodes."""
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
                        f"PyTorch reads integers of at most {_INTEGER_BITS // 8 + 1} bytes: store it as a tensor",
                    )
                stack.append(arg)
            case "INT":
                stack.append({b"00": False, b"01": True}[arg] if arg in (b"00", b"01") else self._decimal(arg))
            case "LONG":
                stack.append(self._decimal(arg.removesuffix(b"L")))
            case "FLOAT":
                if not _FLOAT.fullmatch(arg):
                    raise FileFormatError.damaged(self.where, f"{arg[:40]!r} should be a number")
                stack.append(float(arg))
            case "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(arg)
            case "UNICODE":
                stack.append(str(arg, "raw-unicode-escape"))
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(arg)
            case "BYTEARRAY8":
                stack.append(self.values.opaque(Global("builtins", "bytearray"), (bytes(arg),)))
            case "SHORT_BINSTRING" | "BINSTRING":
                # `pickletools` gives the bytes as Latin-1; the caller decides which encoding they have.
                stack.append(arg.encode("latin-1").decode(self.encoding))
            case "STRING":
                if len(arg) < 2 or arg[:1] != arg[-1:] or arg[:1] not in (b"'", b'"'):
                    raise FileFormatError.damaged(self.where, f"the text {arg[:40]!r} has no quotes around it")
                stack.append(codecs.escape_decode(arg[1:-1])[0].decode(self.encoding))
            case "EMPTY_LIST":
                self.values.budget.spend(CONTAINER)
                stack.append([])
            case "EMPTY_DICT":
                self.values.budget.spend(CONTAINER)
                stack.append({})
            case "EMPTY_SET":
                stack.append(self.values.opaque(Global("builtins", "set"), (), "set"))
            case "LIST":
                made = self._to_mark()
                self.stack.append(made)
            case "DICT":
                items = self._to_mark()
                self.stack.append({})
                self._set_items(items)
            case "FROZENSET":
                members = self._to_mark()
                self.stack.append(self.values.opaque(self.values.named("builtins", "frozenset"), (members,)))
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
                stack.append(self.values.named(module.decode(), attribute.decode()))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self.values.named(module, attribute))
            case "NEWOBJ":
                args, kind = stack.pop(), stack.pop()
                stack.append(self.values.new(kind, args))
            case "NEWOBJ_EX":
                kwargs, args, kind = stack.pop(), stack.pop(), stack.pop()
                if not isinstance(kind, Global) or kind.dotted in HARMLESS:
                    raise FileFormatError(
                        f"{self.where} calls {described(kind)} with keyword arguments, which torch.save never does"
                    )
                stack.append(self.values.opaque(kind, (args, kwargs), "newobj_ex"))
            case "BUILD":
                state = stack.pop()
                self.values.set_state(stack[-1], state)
            case _:
                raise FileFormatError(f"{self.where} contains the pickle opcode {name}, which torch.save never writes")

    def _decimal(self, text: bytes) -> int:
        if not _DECIMAL.fullmatch(text):
            raise FileFormatError.damaged(self.where, f"{text[:40]!r} should be a whole number")
        return int(text)

    def _to_mark(self) -> list[Any]:
        """Remove the last mark and the values above it, and return these."""
        if not self.below:
            raise FileFormatError.damaged(self.where, "an opcode needs a mark, and there is none on the stack")
        values = self.stack
        self.stack = self.below.pop()
        return values

    def _append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
            return
        self.values.require_foreign(target, "appends values to")
        target.appended.extend(values)

    def _add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Opaque) or target.how != "set":
            self.values.require_foreign(target, "adds values to")
        target.appended.extend(values)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = self.values.pairs(items, target)
        if isinstance(target, dict):
            target.update(pairs)
            return
        if not is_counter(target):
            self.values.require_foreign(target, "sets items of")
        target.items.extend(pairs)


@functools.lru_cache(maxsize=10_000)
def _integers(text: bytes) -> tuple[int, ...]:
    """Return the numbers that BININT1, BININT2 and BININT opcodes push; the other opcodes make a tuple of them."""
    found = []
    position = 0
    while position < len(text):
        width = _INT_BYTES.get(text[position], 0)
        if width:
            number = text[position + 1 : position + 1 + width]
            found.append(int.from_bytes(number, "little", signed=width == 4))
        position += 1 + width
    return tuple(found)

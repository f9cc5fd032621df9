"""Write inert values as a pickle of protocol 2, as `torch.save` does, without torch.

Tensors get exactly the opcodes of `torch.save`, including its memo entries, so that readers which recognise these (such
as `pickles`) can read a whole tensor in one step.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.limits import NESTING, room_for_nesting
from modelcli.checkpoints.plan import PlannedStorage, PlannedTensor, Source
from modelcli.checkpoints.torch_pickle.allow_list import STORAGE_CLASSES
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef
from modelcli.errors import RequestError

#: Returns the key of a storage and its number of elements, given its source and dtype (None for raw bytes).
StorageKey = Callable[[Source, str | None], tuple[str, int]]


def dumps(value: Any, storage_key: StorageKey) -> bytes:
    """Pickle a tree of inert values."""
    out = bytearray(b"\x80\x02")
    with room_for_nesting():
        _Writer(out, storage_key).write(value, 0)
    out += b"."
    return bytes(out)


class _Writer:
    def __init__(self, out: bytearray, storage_key: StorageKey) -> None:
        self.out = out
        self.storage_key = storage_key
        self.memo: dict[Global | str | int, int] = {}
        self.count = 0
        self.kept: list[Any] = []
        self.beginnings: dict[str, bytes] = {}
        # Two levels more than a reader allows: `_metadata` in the state dict, which is in the tree.
        self.deepest = NESTING.value + 2

    def write(self, value: Any, depth: int) -> None:
        out = self.out
        if depth > self.deepest:
            raise RequestError(
                f"the checkpoint has values that contain themselves or are nested deeper than {self.deepest}",
                "use --bare to write only the state dict",
            )
        if isinstance(value, dict | list | tuple | Opaque) and (number := self.memo.get(id(value))) is not None:
            self._get(number)
            return
        match value:
            case None:
                out += b"N"
            case True:
                out += b"\x88"
            case False:
                out += b"\x89"
            case int():
                self._integer(value)
            case float():
                out += b"G" + struct.pack(">d", value)
            case str():
                data = value.encode("utf-8", "surrogatepass")
                out += b"X" + struct.pack("<I", len(data)) + data
            case bytes():
                self.write(Opaque(Global("_codecs", "encode"), (value.decode("latin-1"), "latin1")), depth)
            case PlannedTensor():
                self._tensor(value, requires_grad=False)
            case TensorEntry():
                self._entry(value)
            case CompositeEntry():
                self.write(value.made_by, depth)
            case PlannedStorage():
                self._storage(value.source, value.dtype)
            case StorageRef(offset=0):
                self._storage(value.span, value.dtype)
            case tuple():
                self._sequence(value, depth)
                if value:
                    self._put(value)
            case list():
                out += b"]"
                self._put(value)
                out += b"("
                for item in value:
                    self.write(item, depth + 1)
                out += b"e"
            case OrderedDict():
                self._global(Global("collections", "OrderedDict"))
                out += b")R"
                self._put(value)
                self._items(value, depth)
                if value.state is not None:
                    self.write(value.state, depth + 1)
                    out += b"b"
            case dict():
                out += b"}"
                self._put(value)
                self._items(value, depth)
            case Global():
                self._global(value)
            case Opaque():
                self._opaque(value, depth)
            case _:
                raise RequestError(f"a value of type {type(value).__name__} cannot be written to a checkpoint")

    def _integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif 0 <= value < 65536:
            self.out += b"M" + struct.pack("<H", value)
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(data) > 255:
                raise RequestError(
                    "torch.load cannot read integers of more than 255 bytes, and the checkpoint contains one",
                    "use --bare to write only the state dict",
                )
            self.out += b"\x8a" + bytes([len(data)]) + data

    def _sequence(self, values: tuple[Any, ...], depth: int) -> None:
        if not values:
            self.out += b")"
            return
        if len(values) > 3:
            self.out += b"("
        for item in values:
            self.write(item, depth + 1)
        self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(values), b"t")

    def _items(self, values: Mapping[Any, Any], depth: int) -> None:
        if values:
            self.out += b"("
            for key, item in values.items():
                self.write(key, depth + 1)
                if isinstance(key, str):
                    self._number()
                self.write(item, depth + 1)
            self.out += b"u"

    def _global(self, value: Global) -> None:
        if (number := self.memo.get(value)) is not None:
            self._get(number)
            return
        self.out += b"c" + value.module.encode() + b"\n" + value.name.encode() + b"\n"
        self._put(value)

    def _word(self, text: str) -> None:
        """Write a text that occurs often: in full once, then from the memo."""
        if (number := self.memo.get(text)) is not None:
            self._get(number)
            return
        self.write(text, 0)
        self.memo[text] = self.count
        self._number()

    def _put(self, value: Any) -> None:
        """Put a value into the memo: a class by its name, a container by its identity, so that it stays one object."""
        self.memo[value if isinstance(value, Global) else id(value)] = self.count
        self.kept.append(value)
        self._number()

    def _number(self) -> None:
        """Write the opcode that puts the last value into the reader's memo, under the next number."""
        number = self.count
        self.count += 1
        self.out += b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def _get(self, number: int) -> None:
        self.out += b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)

    def _opaque(self, value: Opaque, depth: int) -> None:
        is_set = value.how == "set"
        if value.how == "newobj_ex":
            raise RequestError(
                "modelcli cannot write an object in this checkpoint that is made with keyword arguments",
                "use --bare to write only the state dict",
            )
        self.write(value.call, depth + 1)
        self.write((value.appended,) if is_set else value.args, depth + 1)
        self.out += b"\x81" if value.how == "newobj" else b"R"
        self._put(value)
        for item in value.appended if not is_set else ():
            self.write(item, depth + 1)
            self.out += b"a"
        for key, item in value.items:
            self.write(key, depth + 1)
            self.write(item, depth + 1)
            self.out += b"s"
        if value.state is not None:
            self.write(value.state, depth + 1)
            self.out += b"b"

    def _entry(self, entry: TensorEntry) -> None:
        planned = PlannedTensor(entry.shape, entry.dtype, entry.stride, entry.offset, entry.storage)
        if not entry.is_parameter:
            self._tensor(planned, requires_grad=bool(entry.requires_grad))
            return
        self._global(Global("torch._utils", "_rebuild_parameter"))
        self._tensor(planned, requires_grad=False)
        self.out += b"\x88" if entry.requires_grad else b"\x89"
        self._empty_ordered_dict()
        self.out += b"\x87R"

    def _tensor(self, tensor: PlannedTensor, *, requires_grad: bool) -> None:
        """Write `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`; v3 for newer dtypes."""
        is_typed = tensor.dtype in STORAGE_CLASSES
        dtype = tensor.dtype if is_typed else None
        beginning = self.beginnings.get(tensor.dtype)
        if beginning is not None:
            self.out += beginning
        else:
            rebuild = Global("torch._utils", "_rebuild_tensor_v2" if is_typed else "_rebuild_tensor_v3")
            self._global(rebuild)
            self.out += b"("
            self._storage_class(dtype)
            self.beginnings[tensor.dtype] = self._as_fetched(rebuild) + b"(" + self._storage_class_as_fetched(dtype)
        self._storage_place(tensor.source, dtype)
        self._integer(tensor.offset)
        for sizes in (tensor.shape, tensor.stride):
            self._sequence(sizes, 0)
            if sizes:
                self._number()
        self.out += b"\x88" if requires_grad else b"\x89"
        self._empty_ordered_dict()
        if not is_typed:
            self._global(Global("torch", tensor.dtype))
        self.out += b"t"
        self._number()
        self.out += b"R"
        self._number()

    def _storage(self, source: Source, dtype: str | None) -> None:
        """The persistent id of a storage: `("storage", class, key, location, number of elements)`."""
        self._storage_class(dtype)
        self._storage_place(source, dtype)

    def _storage_class(self, dtype: str | None) -> None:
        """The beginning of a persistent id, which all storages of a dtype have in common."""
        self.out += b"("
        self._word("storage")
        self._global(_class_of(dtype))

    def _storage_class_as_fetched(self, dtype: str | None) -> bytes:
        """The same from the second time on: all in it is fetched from the memo."""
        return b"(" + self._as_fetched("storage") + self._as_fetched(_class_of(dtype))

    def _storage_place(self, source: Source, dtype: str | None) -> None:
        """The rest of a persistent id."""
        key, count = self.storage_key(source, dtype)
        data = key.encode()
        self.out += b"X" + struct.pack("<I", len(data)) + data
        self._number()
        self._word("cpu")
        self._integer(count)
        self.out += b"t"
        self._number()
        self.out += b"Q"

    def _as_fetched(self, value: Global | str) -> bytes:
        """What fetches a class or a word from the memo."""
        number = self.memo[value]
        return b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)

    def _empty_ordered_dict(self) -> None:
        self._global(_ORDERED_DICT)
        self.out += b")R"
        self._number()


#: Made once: each tensor has one of no hooks.
_ORDERED_DICT = Global("collections", "OrderedDict")


def _class_of(dtype: str | None) -> Global:
    """The class of a storage."""
    return Global("torch", STORAGE_CLASSES[dtype]) if dtype else Global("torch.storage", "UntypedStorage")

"""Inert values from what the opcodes of a pickle ask for: tensors, storages and calls, none of which is carried out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from modelcli.checkpoints import limits, shapes
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import Storage
from modelcli.checkpoints.torch_pickle.allow_list import (
    COUNTER,
    DICT_ATTRIBUTES,
    GETATTR,
    GETATTR_ENUMS,
    GETATTR_MEMBERS,
    HARMLESS,
    INTERPRETED,
    PARAMETER,
    STORAGE_DTYPES,
    TENSOR_PROPERTIES,
)
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef, described, sizes_in
from modelcli.errors import FileFormatError
from modelcli.model.dtypes import ITEM_BYTES, is_differentiable

#: Where a storage was when it was saved, but for the meta device, which has no values.
_LOCATION = re.compile(r"(?!meta\b)[a-z][a-z0-9_]*(?::[0-9]{1,9})?")
_PLAIN_DTYPES = frozenset(dtype for dtype in ITEM_BYTES if not dtype.startswith("q"))
_SEQUENCES = frozenset({list, tuple})
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_REBUILD_META = Global("torch._utils", "_rebuild_meta_tensor_no_storage")
#: What a list, a dict or an object takes in a file: the least that torch.save writes for one, and what is in it.
CONTAINER = 16
#: What an item of a dict takes.
_ITEM = 32

#: Makes a value of the arguments of a call; None where it is to be kept as a call.
Call = Callable[[tuple[Any, ...]], Any]
#: Gives the bytes of a storage by its key and dtype (None for raw bytes).
SpanOf = Callable[[str, str | None], Storage]


class ValueBuilder:
    """Builds the inert values of one pickle, and notes which names in it are on no allow-list.

    Attributes:
        foreign: the names of classes and functions outside the allow-list, in the order in which they were found.
        attributes: the names and values of attributes that are set on tensors.
        last_text: gives the text that was pushed last, which is the key of the tensor being built in a state dict.
    """

    def __init__(
        self,
        where: str,
        span_of: SpanOf,
        budget: limits.Budget,
        *,
        exact: bool,
        calls: Mapping[str, Call],
    ) -> None:
        self.where = where
        self.budget = budget
        self.span_of = span_of
        self.exact = exact
        self.calls = calls
        self.last_text: Callable[[], str | None] = lambda: None
        self.foreign: dict[str, None] = {}
        self.attributes: list[tuple[str, Any]] = []
        self.getattr_misused = False
        self.storages: dict[str, StorageRef] = {}
        self.views: dict[str, tuple[str, StorageRef]] = {}
        self.resolved: dict[tuple[Any, ...], Storage] = {}
        self.extents: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        #: How often a key with a hash that a file can choose was put into a dict, by the dict and the hash.
        self.chosen_hashes: Counter[tuple[int, int]] = Counter()

    def require_foreign(self, target: Any, done: str) -> None:
        """Raise FileFormatError where something is done to a value that torch knows, and would make another of it.

        What foreign code makes is nothing here but what it is made from.
        """
        if not isinstance(target, Opaque) or (isinstance(target.call, Global) and target.call.dotted in HARMLESS):
            raise FileFormatError(f"{self.where}: {done} {described(target)}, which torch.save never writes")

    def pairs(self, items: list[Any], target: Any) -> list[tuple[Any, Any]]:
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

    def named(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise FileFormatError(f"{self.where} is damaged: the name of a class is no text")
        found = Global(module, name)
        if found.dotted not in HARMLESS and found.dotted not in self.calls:
            limits.check_name(found.dotted, self.where)
            self.foreign[found.dotted] = None
        return found

    def storage(self, persistent_id: Any) -> Any:
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
        dtype = STORAGE_DTYPES.get(storage_class.name)
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

    def reduce(self, function: Any, args: Any) -> Any:
        name = function.dotted if isinstance(function, Global) else ""
        if not isinstance(args, tuple):
            raise FileFormatError(f"{self.where} is damaged: {described(function)} is called with no tuple")
        if name in self.calls:
            made = self.calls[name](args)
            if made is not None:
                return made
            self.foreign[name] = None
        if name not in INTERPRETED:
            if name in GETATTR:
                self._judge_getattr(name, args)
            return self.opaque(function, args)
        match name, args:
            case "torch.nn.parameter.Parameter", (data,):
                return self._parameter(data, grad=True)
            case "torch.nn.parameter.Parameter", (data, bool() as grad):
                return self._parameter(data, grad=grad)
            case "torch._utils._rebuild_parameter", (data, bool() as grad, hooks):
                self.require_no_hooks(hooks)
                return self._parameter(data, grad=grad)
            case "torch._utils._rebuild_parameter_with_state", (data, bool() as grad, hooks, state):
                self.require_no_hooks(hooks)
                self._set_attributes(state)
                return self._parameter(data, grad=grad)
            case "collections.OrderedDict", ():
                self.budget.spend(CONTAINER)
                return OrderedDict()
            case "collections.OrderedDict", (list() as pairs,):
                self.budget.spend(_ITEM * len(pairs))
                made = OrderedDict()
                made.update(self.pairs([part for pair in pairs for part in _pair(pair)], made))
                return made
            # A name for the rest would copy it, and a file may have long arguments in many places.
            case "torch._utils._rebuild_tensor_v2", (StorageRef() as storage, offset, shape, stride, grad, hooks, *_):
                if len(args) <= 7:
                    self.require_no_hooks(hooks)
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
                    self.require_no_hooks(hooks)
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
                self.budget.spend(CONTAINER)
                return self._of_class(function, kind, self.reduce(inner, inside), args, state)
        raise FileFormatError(f"{self.where}: {name} is called with arguments that torch.save never gives it")

    def require_no_hooks(self, hooks: Any) -> None:
        """Raise FileFormatError for hooks of a tensor: torch runs what is there, and torch.save writes none."""
        if not (hooks is None or (isinstance(hooks, dict) and not hooks)):
            raise FileFormatError(f"{self.where}: a tensor has hooks, which torch.save never writes")

    def new(self, kind: Any, args: Any) -> Any:
        """What `kind.__new__(kind, *args)` gives."""
        if not isinstance(args, tuple):
            raise FileFormatError(f"{self.where} is damaged: {described(kind)} is called with no tuple")
        match kind:
            case Global(module="collections", name="OrderedDict"):
                self.budget.spend(CONTAINER)
                return OrderedDict()  # which only `__init__` would fill
            case Global() if kind.dotted == PARAMETER:
                return self.reduce(kind, args)
        return self.opaque(kind, args, "newobj")

    def _parameter(self, data: Any, *, grad: bool) -> Any:
        """A tensor as a parameter; of what is no view of a storage, the call that makes it one."""
        if isinstance(data, TensorEntry):
            return replace(self._flagged(data, grad), is_parameter=True)
        if not isinstance(data, Opaque):
            raise FileFormatError(f"{self.where}: {described(data)} is made a parameter, and is no tensor")
        return self.opaque(_REBUILD_PARAMETER, (data, grad, OrderedDict()))

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
            raise FileFormatError(f"{self.where}: {described(made)} is made a tensor of {kind.dotted}, and is none")
        if isinstance(made.call, Global) and made.call.name == "_rebuild_wrapper_subclass":
            del self.attributes[known:]  # its values are in them: they are its parts
            return self.opaque(function, args)
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
        return self.opaque(_REBUILD_META, (Global("torch", dtype), shape, stride, grad))

    def _judge_getattr(self, name: str, args: Any) -> None:
        """`getattr` is foreign, unless all that it is called for are members of enums, by their names."""
        match args:
            case Global() as kind, str() as member if kind.dotted in GETATTR_ENUMS and member in GETATTR_MEMBERS:
                if not self.getattr_misused:
                    self.foreign.pop(name, None)
            case _:
                self.getattr_misused = True
                self.foreign[name] = None

    def opaque(self, call: Any, args: Any, how: str = "reduce") -> Opaque:
        """A call, kept as it is. What torch would call at once must not change with a list that is changed later."""
        self.budget.spend(CONTAINER)
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
            raise FileFormatError(f"{self.where} is damaged: requires_grad of a tensor is {described(grad)}")
        # Only numbers may be looked up by: a file can make tuples that no hash of them ends.
        sizes, steps = shapes.sizes(sizes_in(shape), self.where), shapes.sizes(sizes_in(stride), self.where)
        made = self.view(storage, dtype, offset, sizes, steps, grad)
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

    def view(
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
            name = self.last_text() or "a tensor"
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

    def set_state(self, target: Any, state: Any) -> None:
        """Give an object its state. A tensor's would make it another one, wherever it stands already."""
        match target, state:
            case OrderedDict(), dict():
                self.budget.spend(_ITEM * len(state))
                if (name := next((name for name in state if name in DICT_ATTRIBUTES), None)) is not None:
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
                if not is_counter(target):
                    self.require_foreign(target, "a state is set on")
                if target.state is not None:
                    raise FileFormatError(f"{self.where}: a state is set twice on {described(target)}")
                target.state = state


def is_counter(value: Any) -> bool:
    return isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted == COUNTER


def _pair(value: Any) -> tuple[Any, Any]:
    key, item = value
    return key, item

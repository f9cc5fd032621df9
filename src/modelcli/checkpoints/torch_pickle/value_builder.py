"""Build inert values from what a pickle describes: tensors, storages, and calls that are recorded, not carried out."""

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
    SHARDED_CLASSES,
    SHARDED_MEMBER,
    STORAGE_DTYPES,
    TENSOR_PROPERTIES,
)
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef, described, sizes_in
from modelcli.errors import FileFormatError
from modelcli.model.dtypes import ITEM_BYTES, is_differentiable
from modelcli.wording import brief_repr

#: The device that a storage was saved from, except for the meta device, which has no values.
_LOCATION = re.compile(r"(?!meta\b)[a-z][a-z0-9_]*(?::[0-9]{1,9})?")
_PLAIN_DTYPES = frozenset(dtype for dtype in ITEM_BYTES if not dtype.startswith("q"))
_SEQUENCES = frozenset({list, tuple})
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_REBUILD_META = Global("torch._utils", "_rebuild_meta_tensor_no_storage")
#: The bytes that a list, a dict or an object takes in a file: the least that torch.save writes for it and its content.
CONTAINER = 16
#: The bytes that an item of a dict takes in a file.
_ITEM = 32

#: Gets the arguments of a call and returns its value, or None to keep it as a call.
Call = Callable[[tuple[Any, ...]], Any]
#: Returns the bytes of a storage by its key and dtype (None for raw bytes).
SpanOf = Callable[[str, str | None], Storage]


class ValueBuilder:
    """Builds the inert values of one pickle, and collects the names in it that are not on the allow-list.

    Attributes:
        foreign: the names that are not on the allow-list, in the order in which they were found.
        attributes: the names and values of the attributes that the pickle sets on tensors.
        last_text: returns the text that was pushed last: in a state dict, the key of the tensor that is being built.
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
        #: How many keys whose hash a file can choose were put into a dict, by the dict and the hash.
        self.chosen_hashes: Counter[tuple[int, int]] = Counter()

    def require_foreign(self, target: Any, done: str) -> None:
        """Raise FileFormatError if `target` is a value that the pickle may not change after it was made.

        An object of a foreign class may be changed, because only its description is kept. `done` says what the pickle
        does to the value, for the message.
        """
        if not isinstance(target, Opaque) or (isinstance(target.call, Global) and target.call.dotted in HARMLESS):
            raise FileFormatError(f"{self.where} {done} {described(target)}, which torch.save never does")

    def pairs(self, items: list[Any], target: Any) -> list[tuple[Any, Any]]:
        """Return the keys and values to put into `target`."""
        pairs = list(zip(items[::2], items[1::2], strict=True))
        for key, _ in pairs:
            if type(key) is not str and not (type(key) is int and -(2**60) < key < 2**60):
                self._pay_for_key(key, target)
        return pairs

    def _pay_for_key(self, key: Any, target: Any) -> None:
        """Charge the budget for a key whose hash the file can choose.

        Adding many keys with equal hashes to a dict takes quadratic time. A tuple is hashed again, and compared item by
        item, each time it is used.
        """
        length = 1
        if isinstance(key, tuple):
            length += len(key)
            self.budget.spend(length)
            if any(isinstance(part, tuple) for part in key):
                raise ValueError("a dict has a key that is a tuple of tuples, which can take very long to hash")
        dict_and_hash = id(target), hash(key)
        self.chosen_hashes[dict_and_hash] += 1
        self.budget.spend(length * self.chosen_hashes[dict_and_hash])

    def named(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise FileFormatError.damaged(self.where, "the name of a class is not a text")
        found = Global(module, name)
        if found.dotted not in HARMLESS and found.dotted not in self.calls:
            limits.check_name(found.dotted, self.where)
            self.foreign[found.dotted] = None
        return found

    def storage(self, persistent_id: Any) -> Any:
        """Return the storage that a persistent id names, or a class, whose source torch saved so before 1.6."""
        if not isinstance(persistent_id, tuple):
            raise FileFormatError.damaged(self.where, "a persistent id is not a tuple")
        if persistent_id[0] == "module" and isinstance(persistent_id[1], Global):
            return persistent_id[1]
        # Naming the rest would copy it, and a file may use one long tuple many times.
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
            raise FileFormatError.damaged(self.where, "a persistent id does not describe a storage")
        is_meta = location != "cpu" and self._is_meta(location)
        found = self.storages.get(key)
        dtype = STORAGE_DTYPES.get(storage_class.name)
        if found is None:
            if dtype is None and storage_class.name != "UntypedStorage":
                raise FileFormatError(
                    f"{self.where}: storage {key!r} has the class {storage_class.dotted}, which torch does not have"
                )
            found = self.storages[key] = StorageRef(self.span_of(key, dtype), dtype, count, is_meta=is_meta)
            if self.exact and found.span.nbytes != count * found.item:
                raise FileFormatError.damaged(
                    self.where,
                    f"storage {key!r} should have {count * found.item:,} bytes, but has {found.span.nbytes:,}",
                )
        elif found.dtype != dtype:
            raise FileFormatError.damaged(self.where, f"it gives storage {key!r} two dtypes, {found.dtype} and {dtype}")
        elif (found.count, found.is_meta) != (count, is_meta):
            raise FileFormatError.damaged(self.where, f"it gives storage {key!r} two sizes or two devices")
        if self.views and key in self.views:
            raise FileFormatError.damaged(
                self.where, f"it uses {key!r} both for a storage and for a part of another storage"
            )
        return found if view is None else self._part(key, found, view)

    def _is_meta(self, location: Any) -> bool:
        """Whether a storage was saved from the meta device, so that it has no values."""
        if location == "meta":
            return True
        if not isinstance(location, str) or not _LOCATION.fullmatch(location):
            raise FileFormatError(
                f"{self.where}: a storage was saved from {brief_repr(location)}, which is not a device of torch"
            )
        return False

    def _part(self, key: str, found: StorageRef, view: Any) -> StorageRef:
        """Return a part of a storage, which torch before 0.4 saved as a storage with its own key, offset and size."""
        own, offset, size = view
        if not isinstance(own, str) or type(offset) is not int or type(size) is not int or min(offset, size) < 0:
            raise FileFormatError.damaged(self.where, f"a part of storage {key!r} has no valid key, offset and size")
        part = StorageRef(found.span, found.dtype, size, offset, found.is_meta)
        if own in self.storages or self.views.setdefault(own, (key, part)) != (key, part):
            raise FileFormatError.damaged(self.where, f"two storages have the key {own!r}")
        return self.views[own][1]

    def reduce(self, function: Any, args: Any) -> Any:
        """Return the value of `function(*args)`: a tensor or dict for the calls of `INTERPRETED`, else an `Opaque`."""
        name = function.dotted if isinstance(function, Global) else ""
        if not isinstance(args, tuple):
            raise FileFormatError.damaged(self.where, f"the arguments of {described(function)} are not a tuple")
        if name in self.calls:
            made = self.calls[name](args)
            if made is not None:
                return made
            self.foreign[name] = None
        if name not in INTERPRETED:
            if name in GETATTR:
                self._judge_getattr(name, args)
                match args:
                    case Global() as outer, str() as member if outer.dotted in SHARDED_CLASSES:
                        return Global(outer.module, f"{outer.name}.{member}")  # a class inside another
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
            # Naming the rest would copy it, and a file may use long arguments many times.
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
        raise FileFormatError(f"{self.where} calls {name} with arguments that torch.save never writes")

    def require_no_hooks(self, hooks: Any) -> None:
        """Raise FileFormatError if a tensor has hooks. torch would run them, and torch.save writes none."""
        if not (hooks is None or (isinstance(hooks, dict) and not hooks)):
            raise FileFormatError(
                f"{self.where} gives a tensor hooks, which torch would run and torch.save never writes"
            )

    def new(self, kind: Any, args: Any) -> Any:
        """Return the value of `kind.__new__(kind, *args)`."""
        if not isinstance(args, tuple):
            raise FileFormatError.damaged(self.where, f"the arguments of {described(kind)} are not a tuple")
        match kind:
            case Global(module="collections", name="OrderedDict"):
                self.budget.spend(CONTAINER)
                return OrderedDict()  # only `__init__` would add items
            case Global() if kind.dotted == PARAMETER:
                return self.reduce(kind, args)
        return self.opaque(kind, args, "newobj")

    def _parameter(self, data: Any, *, grad: bool) -> Any:
        """Return a tensor as a parameter; for one that is not a view of a storage, the call that makes it one."""
        if isinstance(data, TensorEntry):
            return replace(self._flagged(data, grad), is_parameter=True)
        if not isinstance(data, Opaque):
            raise FileFormatError(f"{self.where} makes a parameter of {described(data)}, which is not a tensor")
        return self.opaque(_REBUILD_PARAMETER, (data, grad, OrderedDict()))

    def _flagged(self, tensor: TensorEntry, grad: bool) -> TensorEntry:
        if grad and not is_differentiable(tensor.dtype):
            raise self._cannot_be_trained(tensor.dtype)
        return replace(tensor, requires_grad=grad)

    def _cannot_be_trained(self, dtype: str) -> FileFormatError:
        return FileFormatError(f"{self.where} sets requires_grad of a {dtype} tensor, which torch does not allow")

    def _of_class(self, function: Global, kind: Global, made: Any, args: tuple[Any, ...], state: Any) -> Any:
        """Return a tensor that has attributes or a class of its own, which a state dict does not load."""
        if kind.dotted in SHARDED_CLASSES and isinstance(made, Opaque):
            return self.opaque(function, args)  # its state may be anything
        known = len(self.attributes)
        self._set_attributes(state)
        if isinstance(made, TensorEntry):
            return replace(made, is_parameter=True) if kind.dotted == PARAMETER else made
        if not isinstance(made, Opaque):
            raise FileFormatError(f"{self.where} makes a {kind.dotted} of {described(made)}, which is not a tensor")
        if isinstance(made.call, Global) and made.call.name == "_rebuild_wrapper_subclass":
            del self.attributes[known:]  # the attributes of a wrapper subclass are the tensors that it is made of
            return self.opaque(function, args)
        return made

    def _set_attributes(self, state: Any) -> None:
        """Collect the attributes that a pickle sets on a tensor.

        `state` is a dict or, for a class with slots, a tuple of two dicts. Raises FileFormatError for an attribute that
        changes the tensor itself.
        """
        parts = state if isinstance(state, tuple) else (state, None)
        if len(parts) != 2 or not all(part is None or isinstance(part, dict) for part in parts):
            raise FileFormatError.damaged(self.where, "the attributes of a tensor are not a dict")
        for part in parts:
            self.budget.spend(_ITEM * len(part or ()))
            for name, value in (part or {}).items():
                if not isinstance(name, str) or name in TENSOR_PROPERTIES or name.startswith("__"):
                    raise FileFormatError(
                        f"{self.where} sets the attribute {brief_repr(name)} of a tensor, which can change its values",
                        "load it with torch, and save a state dict of tensor.detach().clone()",
                    )
                self.attributes.append((name, value))

    def _without_values(self, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], grad: bool) -> Opaque:
        """Return a tensor on the meta device, which has no values."""
        return self.opaque(_REBUILD_META, (Global("torch", dtype), shape, stride, grad))

    def _judge_getattr(self, name: str, args: Any) -> None:
        """Count `getattr` as foreign unless every call of it gets an allowed member of an allowed class."""
        match args:
            case Global() as kind, str() as member if (kind.dotted in GETATTR_ENUMS and member in GETATTR_MEMBERS) or (
                kind.dotted in SHARDED_CLASSES and member == SHARDED_MEMBER
            ):
                if not self.getattr_misused:
                    self.foreign.pop(name, None)
            case _:
                self.getattr_misused = True
                self.foreign[name] = None

    def opaque(self, call: Any, args: Any, how: str = "reduce") -> Opaque:
        """Return a call as an `Opaque`. Lists in its arguments are copied, because the pickle may change them later."""
        self.budget.spend(CONTAINER)
        if not isinstance(call, Global):
            # The called object was itself made by a call, so it has no name.
            made_by = call.call if isinstance(call, Opaque) else None
            self.foreign[made_by.dotted if isinstance(made_by, Global) else "a call"] = None
        elif call.dotted in HARMLESS:
            args = self._settled(args, 3)
        return Opaque(call, args, how=how)

    def _settled(self, value: Any, depth: int) -> Any:
        """Return arguments with copies of the lists in them, down to `depth` levels."""
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
        flags: Any = None,
    ) -> TensorEntry | Opaque:
        if dtype is None or dtype not in ITEM_BYTES or type(offset) is not int or offset < 0:
            raise FileFormatError.damaged(
                self.where, f"a tensor has the dtype {dtype} and the offset {brief_repr(offset)}"
            )
        if type(grad) is not bool:
            raise FileFormatError.damaged(self.where, f"requires_grad of a tensor is a {described(grad)}, not a bool")
        # Check that these are numbers before hashing them: hashing a tuple that a file nests in itself may never end.
        sizes, steps = shapes.sizes(sizes_in(shape), self.where), shapes.sizes(sizes_in(stride), self.where)
        made = self.view(storage, dtype, offset, sizes, steps, grad)
        return self._with_flags(made, flags) if flags and isinstance(made, TensorEntry) else made

    def _with_flags(self, tensor: TensorEntry, flags: Any) -> TensorEntry:
        """Return a tensor with the conjugation or negation that its flags ask for. A flag counts whatever its value."""
        if not isinstance(flags, dict) or not all(isinstance(name, str) for name in flags):
            raise FileFormatError.damaged(self.where, "the conj and neg flags of a tensor are not a dict")
        conj, neg = "conj" in flags, "neg" in flags
        if conj and "complex" not in tensor.dtype:
            raise FileFormatError.damaged(
                self.where, f"a tensor of dtype {tensor.dtype} has a conj flag, but is not complex"
            )
        # Two tensors that share a storage and its flags stay tied.
        key = id(tensor.storage), tensor.dtype, conj, neg
        if key not in self.resolved:
            from modelcli.checkpoints.torch_pickle.conj_and_neg import with_flags

            self.resolved[key] = with_flags(tensor.storage, tensor.dtype, conj=conj, neg=neg)
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
            raise FileFormatError.damaged(self.where, f"a tensor of shape {list(shape)} has a storage without a dtype")
        # Nearly all tensors are plain, so that this one check is enough.
        plain = dtype == storage.dtype and not (storage.offset or storage.is_meta or grad) and dtype in _PLAIN_DTYPES
        if plain and 0 <= offset <= storage.count - last and storage.count * ITEM_BYTES[dtype] <= storage.span.nbytes:
            return TensorEntry(shape, dtype, stride, offset, storage.span, grad)
        if dtype.startswith("q"):
            raise FileFormatError.damaged(self.where, f"a quantized tensor of dtype {dtype} has no scale")
        item = ITEM_BYTES[dtype]
        needed = (offset + last) * item if last else 0
        start = storage.offset * storage.item
        room = min(storage.count * storage.item, storage.span.nbytes - start)
        if needed > room:
            name = self.last_text() or "a tensor"
            raise FileFormatError.damaged(
                self.where, f"{name} of shape {list(shape)} needs {needed:,} bytes, but its storage holds {room:,}"
            )
        if start % item or offset < 0:
            raise FileFormatError.damaged(
                self.where, f"a tensor of dtype {dtype} does not start at the start of an element"
            )
        if grad and not is_differentiable(dtype):
            raise self._cannot_be_trained(dtype)
        if storage.is_meta:
            return self._without_values(dtype, shape, stride, grad)
        return TensorEntry(shape, dtype, stride, offset + start // item, storage.span, grad)

    def _extent(self, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
        """Return the number of elements of a storage from the first to the last of a view; 0 for an empty view."""
        last = shapes.extent(shapes.shape(shape, self.where), shapes.sizes(stride, self.where))
        if last >= 2**63:
            raise ValueError(f"a tensor of shape {list(shape)} and stride {list(stride)} spans 2^63 or more elements")
        return last

    def set_state(self, target: Any, state: Any) -> None:
        """Set the state of an object. Refuse it for a tensor, because it would change a tensor that is already used."""
        match target, state:
            case OrderedDict(), dict():
                self.budget.spend(_ITEM * len(state))
                if (name := next((name for name in state if name in DICT_ATTRIBUTES), None)) is not None:
                    raise FileFormatError(
                        f"{self.where} replaces the attribute {name!r} of a dict, so programs would read other items",
                        "load it with torch, and save dict(state_dict)",
                    )
                target.state = {**(target.state or {}), **state}
            case TensorEntry(is_parameter=True), (bool() as grad, _, _):
                # torch before 0.4 wrote requires_grad of a parameter so.
                object.__setattr__(target, "requires_grad", self._flagged(target, grad).requires_grad)
            case TensorEntry(), _:
                raise FileFormatError(
                    f"{self.where} changes a tensor after it has made it, which torch.save never does",
                    "load it with torch, and save its state dict again",
                )
            case _:
                if not is_counter(target):
                    self.require_foreign(target, "sets the state of")
                if target.state is not None:
                    raise FileFormatError(
                        f"{self.where} sets the state of {described(target)} twice, which torch.save never does"
                    )
                target.state = state


def is_counter(value: Any) -> bool:
    return isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted == COUNTER


def _pair(value: Any) -> tuple[Any, Any]:
    key, item = value
    return key, item

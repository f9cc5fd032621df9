"""A blueprint: what a model is made of, as plain data, without torch and without a single weight.

Everything that is shown is shown from a blueprint. Paths are PyTorch's: the root is `""` here and `.` on a screen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, Literal, TypeVar, dataclass_transform

Shape = tuple[int, ...]
_T = TypeVar("_T")
Kind = Literal["parameter", "buffer"]
Trainable = Literal["yes", "no", "partial", "none"]

#: `itemsize` of every dtype of torch, by its name without `torch.`.
#: `float4_e2m1fn_x2` has two numbers in an element of one byte; elements of `quint4x2` share bytes all the same.
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8", "qint8", "quint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("quint4x2", "quint2x4", "bits8", "bits4x2", "bits2x4", "bits1x8"), 1),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "bits16"), 2),
    **dict.fromkeys(("int32", "uint32", "qint32", "float32", "complex32", "bcomplex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
#: The floating-point dtypes that numbers can be converted to: `float4_e2m1fn_x2` has two in an element, and none can.
FLOATING = frozenset(
    name for name in ITEM_BYTES if name.startswith(("float", "bfloat")) and not name.startswith("float4")
)
ROOT = "."


@dataclass_transform(frozen_default=True)
def value_class(cls: type[_T]) -> type[_T]:
    """A dataclass whose instances are never changed, for what a file may have 100,000 of.

    That nothing changes one is for the type checker to see: `frozen=True` sees to it at run time as well, and takes
    three times as long to make each.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


def shown(path: str) -> str:
    """The path as a person reads it: `.` for the root."""
    return path or ROOT


def parent_of(path: str) -> str:
    """The path of the module that holds this module or tensor; the root holds what has no dot."""
    return path.rpartition(".")[0]


def joined(parent: str, name: str) -> str:
    """The path of what is called `name` in the module at `parent`."""
    return f"{parent}.{name}" if parent else name


def ancestors(path: str) -> Iterator[str]:
    """The path itself and every module above it, the root last."""
    while path:
        yield path
        path = parent_of(path)
    yield ""


@value_class
class TensorInfo:
    """One parameter or buffer under one name.

    `shape` is None for a lazy parameter that no forward pass has given a shape yet. `requires_grad` is None where
    nothing says (a buffer, a bare checkpoint). `tied_to` is the first name of the same tensor. `layout` is torch's
    name for how it is stored; `stored_bytes` are what it takes where that is not its elements times their size: of a
    sparse tensor its indices and values, of a quantized one its scales as well.
    """

    name: str
    shape: Shape | None
    dtype: str
    kind: Kind = "parameter"
    requires_grad: bool | None = None
    tied_to: str | None = None
    persistent: bool = True
    layout: str = "strided"
    stored_bytes: int | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape) if self.shape is not None else 0

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype] if self.stored_bytes is None else self.stored_bytes

    @property
    def identity(self) -> str:
        """One name for all the names of a tied tensor."""
        return self.name if self.tied_to is None else self.tied_to  # a name may be empty


@value_class
class ModuleInfo:
    """One module at one path. `type` is None where nothing is known but key names.

    `absent` are the children that are None, by position and name: they are printed and are nothing else.
    `bases` are the names of its classes from its own up to, not including, `Module`; `config` is its `extra_repr()`;
    `own_repr` is set where its class prints itself in its own way; `shared_with` is the first path of the same
    module.
    """

    path: str
    type: str | None
    bases: tuple[str, ...] = ()
    config: str = ""
    shared_with: str | None = None
    own_repr: str | None = None
    absent: tuple[tuple[int, str], ...] = ()

    @property
    def depth(self) -> int:
        return self.path.count(".") + 1 if self.path else 0

    @property
    def is_sequence(self) -> bool:
        return "Sequential" in self.bases or "ModuleList" in self.bases


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What a forward pass showed of one module.

    `output_shape` is a list of ints for a tensor, a list or dict of those for an output of several, None for none.
    `macs` counts the multiply-accumulates of the module and all below it.
    """

    output_shape: Any
    macs: int


@dataclass(frozen=True)
class Trace:
    """A forward pass on the meta device. Modules that are not in `layers` were not called.

    `reason` is None where the pass ran to its end, else the one line that says why it did not; the rows that ran
    are there all the same, and the totals are None.
    """

    inputs: tuple[Shape, ...] | None
    layers: Mapping[str, LayerTrace] = field(default_factory=dict)
    macs: int | None = None
    input_bytes: int | None = None
    forward_backward_bytes: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """What a model adds up to. Each tied tensor is counted once; bytes are what the tensors take in memory."""

    params: int
    trainable_params: int
    buffers: int
    param_bytes: int
    buffer_bytes: int

    @property
    def non_trainable_params(self) -> int:
        return self.params - self.trainable_params


@dataclass(frozen=True)
class Blueprint:
    """A model as plain data: its modules and tensors in PyTorch's order, and a forward pass where one was made."""

    modules: tuple[ModuleInfo, ...]
    tensors: tuple[TensorInfo, ...]
    trace: Trace | None = None

    @property
    def root(self) -> ModuleInfo:
        return self.modules[0]

    @cached_property
    def by_path(self) -> Mapping[str, ModuleInfo]:
        return {module.path: module for module in self.modules}

    @cached_property
    def by_name(self) -> Mapping[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def children(self) -> Mapping[str, tuple[ModuleInfo, ...]]:
        """The direct children of each module, in order."""
        found: dict[str, list[ModuleInfo]] = defaultdict(list)
        for module in self.modules[1:]:
            found[parent_of(module.path)].append(module)
        return {path: tuple(kids) for path, kids in found.items()}

    @cached_property
    def _parameters_below(self) -> Mapping[str, dict[str, TensorInfo]]:
        below: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for tensor in self.tensors:
            if tensor.kind == "parameter":
                for path in ancestors(parent_of(tensor.name)):
                    below[path].setdefault(tensor.identity, tensor)
        return below

    def params_of(self, path: str) -> int:
        """`sum(p.numel() for p in module.parameters())` of the module at this path."""
        return sum(tensor.elements for tensor in self._parameters_below.get(path, {}).values())

    def trainable_of(self, path: str) -> Trainable:
        """Whether the parameters at and below this path are trained; a flag that nothing states counts as yes."""
        flags = {tensor.requires_grad is not False for tensor in self._parameters_below.get(path, {}).values()}
        if not flags:
            return "none"
        return "partial" if len(flags) == 2 else "yes" if flags.pop() else "no"

    @cached_property
    def totals(self) -> Totals:
        return totals_of(self.tensors)

    def with_trace(self, trace: Trace) -> Blueprint:
        return replace(self, trace=trace)


def totals_of(tensors: Iterable[TensorInfo]) -> Totals:
    """Add up tensors, each tied one once."""
    seen: set[str] = set()
    params = trainable = buffers = param_bytes = buffer_bytes = 0
    for tensor in tensors:
        if (identity := tensor.identity) in seen:
            continue
        seen.add(identity)
        elements, nbytes = tensor.elements, tensor.nbytes
        if tensor.kind == "buffer":
            buffers += elements
            buffer_bytes += nbytes
        else:
            params += elements
            param_bytes += nbytes
            trainable += elements if tensor.requires_grad is not False else 0
    return Totals(params, trainable, buffers, param_bytes, buffer_bytes)


def repr_text(blueprint: Blueprint, path: str = "") -> str:
    """The text that `print(module)` gives, built from the blueprint by the rules of `nn.Module.__repr__`.

    `ModuleList` folds runs of equal children (`(0-5): 6 x Block(...)`); a class that prints itself in its own way has
    its own text.
    """
    module = blueprint.by_path[path]
    if module.own_repr is not None:
        return module.own_repr
    children = blueprint.children.get(path, ())
    if "ModuleList" in module.bases:
        return _module_list_text(module, [repr_text(blueprint, child.path) for child in children])
    lines = [f"({child.path.rpartition('.')[2]}): {_indented(repr_text(blueprint, child.path))}" for child in children]
    for position, name in module.absent:
        lines.insert(position, f"({name}): None")
    extra = module.config.split("\n") if module.config else []
    if len(extra) == 1 and not lines:
        return f"{module.type}({extra[0]})"
    if not extra and not lines:
        return f"{module.type}()"
    return f"{module.type}(\n  " + "\n  ".join(extra + lines) + "\n)"


def _module_list_text(module: ModuleInfo, texts: list[str]) -> str:
    if not texts:
        return f"{module.type}()"
    runs: list[tuple[int, int, str]] = []
    for index, text in enumerate(texts):
        if runs and runs[-1][2] == text:
            runs[-1] = (runs[-1][0], index, text)
        else:
            runs.append((index, index, text))
    lines = [
        _indented(f"({first}): {text}" if first == last else f"({first}-{last}): {last - first + 1} x {text}")
        for first, last, text in runs
    ]
    return f"{module.type}(\n  " + "\n  ".join(lines) + "\n)"


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")


# --- to and from JSON ----------------------------------------------------------------------------------------------


def to_json(blueprint: Blueprint) -> dict[str, Any]:
    """The blueprint as plain JSON values. What is not set is left out; classes are listed once."""
    classes: dict[tuple[str | None, tuple[str, ...]], int] = {}
    modules = []
    for module in blueprint.modules:
        number = classes.setdefault((module.type, module.bases), len(classes))
        entry: dict[str, Any] = {"path": module.path, "class": number}
        for key in ("config", "shared_with", "own_repr"):
            if value := getattr(module, key):
                entry[key] = value
        if module.absent:
            entry["absent"] = [list(pair) for pair in module.absent]
        modules.append(entry)
    tensors = []
    for tensor in blueprint.tensors:
        entry = {"name": tensor.name, "shape": tensor.shape and list(tensor.shape), "dtype": tensor.dtype}
        if tensor.shape == ():
            entry["shape"] = []
        if tensor.kind != "parameter":
            entry["kind"] = tensor.kind
        if tensor.requires_grad is not None:
            entry["requires_grad"] = tensor.requires_grad
        if tensor.tied_to is not None:
            entry["tied_to"] = tensor.tied_to
        if not tensor.persistent:
            entry["persistent"] = False
        if tensor.layout != "strided":
            entry["layout"] = tensor.layout
        if tensor.stored_bytes is not None:
            entry["stored_bytes"] = tensor.stored_bytes
        tensors.append(entry)
    document: dict[str, Any] = {
        "classes": [{"type": kind, "bases": list(bases)} for kind, bases in classes],
        "modules": modules,
        "tensors": tensors,
    }
    if trace := blueprint.trace:
        document["trace"] = {
            "inputs": None if trace.inputs is None else [list(shape) for shape in trace.inputs],
            "layers": [[path, layer.output_shape, layer.macs] for path, layer in trace.layers.items()],
            "macs": trace.macs,
            "input_bytes": trace.input_bytes,
            "forward_backward_bytes": trace.forward_backward_bytes,
            "reason": trace.reason,
        }
    return document


def from_json(document: Mapping[str, Any]) -> Blueprint:
    """The inverse of `to_json`. Raises KeyError, TypeError, ValueError or IndexError on anything else."""
    classes = [(_optional_text(entry["type"]), tuple(map(_text, entry["bases"]))) for entry in document["classes"]]
    modules = tuple(
        ModuleInfo(
            path=_text(entry["path"]),
            type=classes[entry["class"]][0],
            bases=classes[entry["class"]][1],
            config=_text(entry.get("config", "")),
            shared_with=_optional_text(entry.get("shared_with")),
            own_repr=_optional_text(entry.get("own_repr")),
            absent=tuple((_size(position), _text(name)) for position, name in entry.get("absent", ())),
        )
        for entry in document["modules"]
    )
    tensors = tuple(
        TensorInfo(
            name=_text(entry["name"]),
            shape=None if entry["shape"] is None else shape_from_json(entry["shape"]),
            dtype=_dtype(entry["dtype"]),
            kind=_one_of(("parameter", "buffer"), entry.get("kind", "parameter")),
            requires_grad=_one_of((None, True, False), entry.get("requires_grad")),
            tied_to=_optional_text(entry.get("tied_to")),
            persistent=_one_of((True, False), entry.get("persistent", True)),
            layout=_text(entry.get("layout", "strided")),
            stored_bytes=_optional_size(entry.get("stored_bytes")),
        )
        for entry in document["tensors"]
    )
    if not modules or modules[0].path:
        raise ValueError("a blueprint starts with its root")
    trace = None
    if entry := document.get("trace"):
        inputs = entry["inputs"]
        trace = Trace(
            inputs=None if inputs is None else tuple(map(shape_from_json, inputs)),
            layers={
                _text(path): LayerTrace(_output_shape(shape), _size(macs)) for path, shape, macs in entry["layers"]
            },
            macs=_optional_size(entry["macs"]),
            input_bytes=_optional_size(entry["input_bytes"]),
            forward_backward_bytes=_optional_size(entry["forward_backward_bytes"]),
            reason=_optional_text(entry["reason"]),
        )
    return Blueprint(modules, tensors, trace)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _optional_text(value: object) -> str | None:
    return None if value is None else _text(value)


def _one_of(allowed: tuple[_T, ...], value: object) -> _T:
    for known in allowed:
        if value is known or (isinstance(known, str) and value == known):
            return known
    raise ValueError(f"expected one of {allowed}, found {value!r}")


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"expected a size, found {value!r}")
    return value


def _optional_size(value: object) -> int | None:
    return None if value is None else _size(value)


def shape_from_json(value: object) -> Shape:
    """A list of sizes as a shape. Raises TypeError or ValueError on anything else."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected a shape, found {value!r}")
    return tuple(map(_size, value))


def _output_shape(value: Any) -> Any:
    """What a `LayerTrace` holds: a list of ints, or a list or dict of those, or None."""
    match value:
        case None:
            return None
        case dict():
            return {key: _output_shape(item) for key, item in value.items()}
        case list() | tuple() if all(type(item) is int for item in value):
            return list(shape_from_json(value))
        case list() | tuple():
            return [_output_shape(item) for item in value]
    raise TypeError(f"expected the shape of an output, found {value!r}")


def _dtype(value: object) -> str:
    if value not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {value!r}")
    return str(value)


def from_keys(tensors: Iterable[TensorInfo], types: Mapping[str, str] | None = None) -> Blueprint:
    """The blueprint of a bare checkpoint: a tree of its key names, and of `types`, class names by path, if any."""
    listed, types = tuple(tensors), types or {}
    children = _tree_of(chain(types, (parent_of(tensor.name) for tensor in listed)))
    named = ((path, types.get(path)) for path in _depth_first(children))
    modules = (ModuleInfo(path, kind, () if kind is None else (kind,)) for path, kind in named)
    return Blueprint(tuple(modules), listed)


def _tree_of(paths: Iterable[str]) -> Mapping[str, list[str]]:
    """The children of each of these paths and of all that lie above them, siblings in their first order."""
    children: dict[str, list[str]] = {"": []}
    for path in paths:
        below: list[str] = []
        while path not in children:
            children[path] = below
            path, below = parent_of(path), [path]
        children[path] += below
    return children


def _depth_first(children: Mapping[str, list[str]]) -> Iterator[str]:
    """Parents before children, each subtree whole."""
    stack = [""]
    while stack:
        path = stack.pop()
        yield path
        stack += reversed(children[path])

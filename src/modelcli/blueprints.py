"""A blueprint: what a model is made of, as plain data, without torch and without a single weight.

Everything that is shown is shown from a blueprint. Paths are PyTorch's: the root is `""` here and `.` on a screen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby, islice, pairwise, takewhile
from math import prod
from operator import itemgetter
from typing import Any, Literal, TypeVar, dataclass_transform

Shape = tuple[int, ...]
_T = TypeVar("_T")
Kind = Literal["parameter", "buffer"]
#: Whether what a module holds is trained; None where nothing says, and where there is nothing to train.
Trainable = bool | Literal["partial"] | None

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
#: The dtypes that a model's input can have: of the others torch cannot make a tensor of zeros or of random values.
INPUT_DTYPES = frozenset(name for name in ITEM_BYTES if not name.startswith(("q", "float4")))
#: What PyTorch's own methods, and people, call them.
_NICKNAMES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "long": "int64",
    "int": "int32",
    "short": "int16",
}
ROOT = "."


def dtype_called(text: str) -> str:
    """The name of a dtype that is called `torch.bfloat16`, `bf16` or `long`; what is none comes back as it is."""
    name = text.removeprefix("torch.")
    return _NICKNAMES.get(name, name)


@dataclass_transform(frozen_default=True)
def value_class(cls: type[_T]) -> type[_T]:
    """A dataclass whose instances are never changed, for what a file may have 100,000 of.

    That nothing changes one is for the type checker to see: `frozen=True` sees to it at run time as well, and takes
    three times as long to make each.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


def is_differentiable(dtype: str) -> bool:
    """Whether torch lets a tensor of a dtype have a gradient: one of whole numbers has none."""
    return dtype.startswith(("float", "bfloat", "complex", "bcomplex"))


def counted(number: int, noun: str, several: str | None = None) -> str:
    """`1 tensor`, `5,000 tensors`; `several` is the plural where it is no more than an s."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def listed(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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


def lies_in(path: str, paths: Container[str]) -> bool:
    """Whether a path is one of these, or below one."""
    return any(above in paths for above in ancestors(path))


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
    def is_differentiable(self) -> bool:
        """Whether torch lets it have a gradient, and so be trained: whole numbers have none."""
        return is_differentiable(self.dtype)

    @property
    def is_trained(self) -> bool | None:
        """Whether a parameter is trained; None where nothing says that of one that could be."""
        return self.requires_grad if self.is_differentiable else False

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
    `macs` counts the multiply-accumulates of the module and all below it; None for a further place of a shared module,
    whose calls are counted at another.
    """

    output_shape: Any
    macs: int | None


@dataclass(frozen=True)
class Trace:
    """A forward pass. Modules that are not in `layers` were not called, but for those in `unseen`: they lie inside a
    scripted module that ran, and nothing tells whether they did.

    `reason` is None where the pass ran to its end, else the one line that says why it did not; the rows that ran
    are there all the same, and the totals are None. `device` is where it was made: `meta`, `cpu`, or `fake` for fake
    tensors; None where none was made. `notes` say what there is to tell of that. `uncounted` names the operators that
    multiply and that nothing is known of: with one of them `macs` is a lower bound.
    """

    inputs: tuple[Shape, ...] | None
    layers: Mapping[str, LayerTrace] = field(default_factory=dict)
    macs: int | None = None
    input_bytes: int | None = None
    forward_backward_bytes: int | None = None
    reason: str | None = None
    device: str | None = "meta"
    notes: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Totals:
    """What a model adds up to. Each tied tensor is counted once; bytes are what the tensors take in memory.

    `trainable_params` is None where nothing says of some parameter whether it is trained.
    """

    params: int
    trainable_params: int | None
    buffers: int
    param_bytes: int
    buffer_bytes: int

    @property
    def non_trainable_params(self) -> int | None:
        return None if self.trainable_params is None else self.params - self.trainable_params


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
    def _below(self) -> Mapping[str, _Sum]:
        """The parameters at and below each module, summed up from the leaves to the root."""
        sums = {module.path: _Sum() for module in self.modules}
        for path, tensor, times in _counted_once(self.tensors):
            holder = path if path in sums else next(above for above in ancestors(path) if above in sums)
            sums[holder].add(tensor, times)
        # Each module stands behind the one that holds it.
        for path in reversed(sums):
            if path and (above := sums.get(parent_of(path))) is not None:
                above.merge(sums[path])
        return sums

    def params_of(self, path: str) -> int:
        """`sum(p.numel() for p in module.parameters())` of the module at this path."""
        return self._below.get(path, _Sum()).elements

    def trainable_of(self, path: str) -> Trainable:
        """Whether the parameters at and below this path are trained, all of them or a part.

        None where the flag of one is unknown and the others do not say it already, and where there are no parameters.
        """
        below = self._below.get(path, _Sum())
        if below.trained and below.frozen:
            return "partial"
        if below.unknown or not (below.trained or below.frozen):
            return None
        return below.trained > 0

    @cached_property
    def totals(self) -> Totals:
        return totals_of(self.tensors)

    def with_trace(self, trace: Trace) -> Blueprint:
        return replace(self, trace=trace)


@dataclass(slots=True)
class _Sum:
    """What parameters come to: their elements, and how many are trained, frozen, or neither for all that is known."""

    elements: int = 0
    trained: int = 0
    frozen: int = 0
    unknown: int = 0

    def add(self, tensor: TensorInfo, times: int) -> None:
        self.elements += times * tensor.elements
        match tensor.is_trained:
            case True:
                self.trained += times
            case False:
                self.frozen += times
            case None:
                self.unknown += times

    def merge(self, other: _Sum) -> None:
        self.elements += other.elements
        self.trained += other.trained
        self.frozen += other.frozen
        self.unknown += other.unknown


def _counted_once(tensors: Sequence[TensorInfo]) -> Iterator[tuple[str, TensorInfo, int]]:
    """Where to count parameters, and how often, so that sums from the leaves to the root have each of them once.

    One with several names counts at each of its places, and is taken off again where the ways from two neighbouring
    places to the root meet: above, it would count twice.
    """
    tied: dict[str, list[TensorInfo]] = defaultdict(list)
    names = {tensor.tied_to for tensor in tensors if tensor.tied_to is not None}
    for tensor in tensors:
        if tensor.kind != "parameter":
            continue
        if tensor.tied_to is None and tensor.name not in names:
            yield parent_of(tensor.name), tensor, 1
        else:
            tied[tensor.identity].append(tensor)
    for first, *others in tied.values():
        places = sorted(parent_of(tensor.name).split(".") for tensor in (first, *others))
        for place in places:
            yield ".".join(place), first, 1
        for place, neighbour in pairwise(places):
            yield _common(place, neighbour), first, -1


def _common(one: Sequence[str], other: Sequence[str]) -> str:
    """The path that two paths, in their components, start with."""
    return ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def totals_of(tensors: Iterable[TensorInfo]) -> Totals:
    """Add up tensors, each tied one once."""
    seen: set[str] = set()
    params = trainable = buffers = param_bytes = buffer_bytes = 0
    all_known = True
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
            trainable += elements if tensor.is_trained else 0
            all_known = all_known and tensor.is_trained is not None
    return Totals(params, trainable if all_known else None, buffers, param_bytes, buffer_bytes)


#: A line of a printed model: how deep it is indented, and what stands in it.
_Line = tuple[int, str]


def repr_text(blueprint: Blueprint, path: str = "") -> str:
    """The text that `print(module)` gives, built from the blueprint by the rules of `nn.Module.__repr__`.

    `ModuleList` folds runs of equal children (`(0-5): 6 x Block(...)`); a class that prints itself in its own way has
    its own text. However deep the modules lie in one another, nothing recurses, and each line is indented once.
    """
    printed: dict[str, list[_Line]] = {}
    stack = [path]
    while stack:
        module = blueprint.by_path[stack[-1]]
        children = () if module.own_repr is not None else blueprint.children.get(module.path, ())
        missing = [child.path for child in children if child.path not in printed]
        if missing:
            stack += missing
        else:
            printed[stack.pop()] = _lines(module, [(_own_name(child), printed.pop(child.path)) for child in children])
    return "\n".join("  " * level + text for level, text in printed[path])


def _own_name(module: ModuleInfo) -> str:
    return module.path.rpartition(".")[2]


def _lines(module: ModuleInfo, children: list[tuple[str, list[_Line]]]) -> list[_Line]:
    """A printed module, from the name and the lines of each of its children."""
    if module.own_repr is not None:
        return [(0, line) for line in module.own_repr.split("\n")]
    if "ModuleList" in module.bases:
        extra, entries = [], _folded([lines for _, lines in children])
    else:
        extra, entries = module.config.split("\n") if module.config else [], _with_absent(module, children)
    if not entries and len(extra) < 2:
        return [(0, f"{module.type}({''.join(extra)})")]
    below = [(1, line) for line in extra]
    for name, lines in entries:
        (_, first), *rest = lines
        below.append((1, f"({name}): {first}"))
        below += [(level + 1, text) for level, text in rest]
    return [(0, f"{module.type}("), *below, (0, ")")]


def _with_absent(module: ModuleInfo, children: list[tuple[str, list[_Line]]]) -> list[tuple[str, list[_Line]]]:
    """The children with those that are None between them, each at its position."""
    entries: list[tuple[str, list[_Line]]] = []
    rest = iter(children)
    for position, name in sorted(module.absent):
        entries += islice(rest, max(position - len(entries), 0))
        entries.append((name, [(0, "None")]))
    return [*entries, *rest]


def _folded(texts: list[list[_Line]]) -> list[tuple[str, list[_Line]]]:
    """The entries of a `ModuleList`: runs of equal ones are one entry, which says how many they are."""
    entries: list[tuple[str, list[_Line]]] = []
    for _, run in groupby(enumerate(texts), key=itemgetter(1)):
        numbers = [number for number, _ in run]
        first, last = numbers[0], numbers[-1]
        (level, text), *rest = texts[first]
        if first == last:
            entries.append((str(first), texts[first]))
        else:
            entries.append((f"{first}-{last}", [(level, f"{last - first + 1} x {text}"), *rest]))
    return entries


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
        for key in ("notes", "uncounted", "unseen"):
            if texts := getattr(trace, key):
                document["trace"][key] = list(texts)
        if trace.device != "meta":
            document["trace"]["device"] = trace.device
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
    for names in ([module.path for module in modules], [tensor.name for tensor in tensors]):
        if len(set(names)) < len(names):
            raise ValueError("a blueprint lists each path once")
    trace = None
    if entry := document.get("trace"):
        inputs = entry["inputs"]
        trace = Trace(
            inputs=None if inputs is None else tuple(map(shape_from_json, inputs)),
            layers={
                _text(path): LayerTrace(_output_shape(shape), _optional_size(macs))
                for path, shape, macs in entry["layers"]
            },
            macs=_optional_size(entry["macs"]),
            input_bytes=_optional_size(entry["input_bytes"]),
            forward_backward_bytes=_optional_size(entry["forward_backward_bytes"]),
            reason=_optional_text(entry["reason"]),
            device=_one_of(("meta", "cpu", "fake", None), entry.get("device", "meta")),
            notes=tuple(map(_text, entry.get("notes", ()))),
            uncounted=tuple(map(_text, entry.get("uncounted", ()))),
            unseen=tuple(map(_text, entry.get("unseen", ()))),
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


#: Lists and dicts in one another that an output may be made of.
_MAX_OUTPUT_DEPTH = 50


def _output_shape(value: Any, depth: int = 0) -> Any:
    """What a `LayerTrace` holds: a list of ints, or a list or dict of those, or None."""
    if depth > _MAX_OUTPUT_DEPTH:
        raise ValueError(f"an output of more than {_MAX_OUTPUT_DEPTH} levels")
    match value:
        case None:
            return None
        case dict():
            return {key: _output_shape(item, depth + 1) for key, item in value.items()}
        case list() | tuple() if all(type(item) is int for item in value):
            return list(shape_from_json(value))
        case list() | tuple():
            return [_output_shape(item, depth + 1) for item in value]
    raise TypeError(f"expected the shape of an output, found {value!r}")


def _dtype(value: object) -> str:
    if value not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {value!r}")
    return str(value)


def from_keys(
    tensors: Iterable[TensorInfo],
    types: Mapping[str, str] | None = None,
    pay: Callable[[int], None] = lambda _characters: None,
) -> Blueprint:
    """The blueprint of a bare checkpoint: a tree of its key names, and of `types`, class names by path, if any.

    A name of 4,000 characters can tell of 2,000 modules: `pay` is told the length of each path before it is made, and
    raises where they are too many.
    """
    listed, types = tuple(tensors), types or {}
    children = _tree_of(chain(types, (parent_of(tensor.name) for tensor in listed)), pay)
    named = ((path, types.get(path)) for path in _depth_first(children))
    modules = (ModuleInfo(path, kind, () if kind is None else (kind,)) for path, kind in named)
    return Blueprint(tuple(modules), listed)


def _tree_of(paths: Iterable[str], pay: Callable[[int], None]) -> Mapping[str, list[str]]:
    """The children of each of these paths and of all that lie above them, siblings in their first order."""
    children: dict[str, list[str]] = {"": []}
    for path in paths:
        below: list[str] = []
        while path not in children:
            pay(len(path))
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

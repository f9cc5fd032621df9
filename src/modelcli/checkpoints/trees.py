"""From a pickle's inert values to what a checkpoint holds: which of them is the state dict, and where its bytes are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modelcli import record as records
from modelcli.blueprint import ITEM_BYTES
from modelcli.checkpoints import pickles
from modelcli.checkpoints.contents import Contents, Storage, TensorEntry
from modelcli.errors import FileFormatError, RequestError, UnsafeError, did_you_mean

#: Modules and tensors of a pickled module: shared ones have a name for each place, and nesting multiplies places.
MAX_NAMES = 1_000_000
#: Where a training checkpoint keeps its state dict, the commonest first.
STATE_DICT_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "weights",
    "params",
    "module",
    "ema",
    "model_ema",
    "state_dict_ema",
    "params_ema",
)


def contents_of(
    path: Path,
    pickled: pickles.Pickle,
    span_of: Callable[[str], Storage],
    key: str | None,
    record_text: str | None = None,
    notes: tuple[str, ...] = (),
) -> Contents:
    """What a file of `torch.save` holds. `span_of` gives the bytes of a storage, by its key."""
    keys, found, chosen = _find_state_dict(path, pickled, key)
    types: dict[str, str] = {}
    state_dict = found if isinstance(found, dict) else _tensors_of_module(path, found, types)
    if not isinstance(found, dict) and not state_dict:
        raise _nothing_to_show(path, pickled)
    values = _Values(path, span_of)
    tensors = {name: values.entry(name, item) for name, item in state_dict.items() if isinstance(item, pickles.Tensor)}
    extras = {name: values.resolved(item) for name, item in state_dict.items() if name not in tensors}
    state = state_dict.state if isinstance(state_dict, pickles.OrderedDict) else None
    metadata = state.get("_metadata") if state else None
    if not isinstance(metadata, dict):
        metadata = {}
    return Contents(
        path=path,
        format="pth",
        tensors=tensors,
        extras=extras,
        metadata={name: values.resolved(item) for name, item in metadata.items() if name != records.METADATA_KEY},
        record=_record(record_text, metadata),
        tree=values.resolved(pickled.value) if keys else None,
        key=keys or None,
        foreign=pickled.foreign,
        notes=(*notes, *chosen),
        types=types,
    )


def _record(zip_text: str | None, metadata: Mapping[str, Any]) -> records.Record | None:
    """The embedded record. Where the two copies differ, the zip record wins."""
    for text in (zip_text, metadata.get(records.METADATA_KEY)):
        if isinstance(text, str) and (record := records.from_text(text)) is not None:
            return record
    return None


def _find_state_dict(
    path: Path, pickled: pickles.Pickle, key: str | None
) -> tuple[tuple[str, ...], Any, tuple[str, ...]]:
    """Where the state dict stands in the tree, the state dict or pickled module, and what to tell of the choice."""
    tree = pickled.value
    if key is not None:
        return _at_key(path, tree, key)
    if _is_state_dict(tree) or _is_module(tree):
        return (), tree, ()
    if isinstance(tree, dict):
        fitting = [
            name
            for name, value in tree.items()
            if isinstance(name, str) and (_is_state_dict(value) or _is_module(value))
        ]
        candidates = [name for name in STATE_DICT_KEYS if name in fitting]
        candidates += [name for name in fitting if name not in candidates]
        if candidates:
            chosen, *others = candidates
            note = f"took the state dict under {chosen!r} of {path.name}"
            if others:
                note += f"; --key takes another: {', '.join(others[:6])}"
            return (chosen,), tree[chosen], (note,)
        if not tree:
            return (), tree, ()
    if pickled.foreign:
        raise _nothing_to_show(path, pickled)
    what = (
        f"a dict with the keys {', '.join(map(repr, list(tree)[:6]))}"
        if isinstance(tree, dict)
        else type(tree).__name__
    )
    raise FileFormatError(f"{path} holds no state dict: it is {what}", "--key names the one to take")


def _nothing_to_show(path: Path, pickled: pickles.Pickle) -> UnsafeError:
    return UnsafeError(
        f"{path} holds no tensors in a state dict, but objects of {', '.join(pickled.foreign[:3])}; "
        "to load them would run code",
        "save model.state_dict() where the model was made, and use that file",
    )


def _is_module(value: Any) -> bool:
    """Whether it is an `nn.Module` pickled whole, as `torch.save(model)` does: told by its state, and never loaded."""
    return (
        isinstance(value, pickles.Opaque)
        and isinstance(value.state, dict)
        and all(isinstance(value.state.get(table), dict) for table in ("_parameters", "_buffers", "_modules"))
    )


def _tensors_of_module(path: Path, root: Any, types: dict[str, str]) -> dict[str, Any]:
    """The tensors of a pickled module under the names that `state_dict()` gives them; `types` gets its classes."""
    found: dict[str, Any] = {}

    def add(module: Any, prefix: str, above: tuple[int, ...]) -> None:
        if len(above) > pickles.MAX_DEPTH:
            raise FileFormatError(f"{path}: modules nested deeper than {pickles.MAX_DEPTH}")
        if len(types) + len(found) > MAX_NAMES:
            raise FileFormatError(f"{path}: a module of more than {MAX_NAMES:,} names")
        if isinstance(module.call, pickles.Global):
            types[prefix.removesuffix(".")] = module.call.name
        hidden = _names_in_set(module.state.get("_non_persistent_buffers_set"))
        for table in ("_parameters", "_buffers"):
            for name, tensor in module.state[table].items():
                if isinstance(name, str) and isinstance(tensor, pickles.Tensor) and name not in hidden:
                    found[prefix + name] = tensor
        for name, child in module.state["_modules"].items():
            if isinstance(name, str) and _is_module(child) and id(child) not in above:
                add(child, f"{prefix}{name}.", (*above, id(child)))

    add(root, "", (id(root),))
    return found


def _names_in_set(value: Any) -> set[str]:
    """The names in an inert set, however it was pickled."""
    if not isinstance(value, pickles.Opaque):
        return set()
    args = (
        [item for arg in value.args if isinstance(arg, list) for item in arg] if isinstance(value.args, tuple) else []
    )
    return {name for name in (*args, *value.appended) if isinstance(name, str)}


def _at_key(path: Path, tree: Any, key: str) -> tuple[tuple[str, ...], Any, tuple[str, ...]]:
    keys: tuple[str, ...] = ()
    value, rest = tree, key
    while rest and isinstance(value, dict):
        # A key may have dots of its own: the longest that is there is meant.
        words = rest.split(".")
        steps = (".".join(words[:count]) for count in range(len(words), 0, -1))
        step = next((step for step in steps if step in value), None)
        if step is None:
            names = [name for name in value if isinstance(name, str)]
            hint = did_you_mean(words[0], names) or f"there are: {', '.join(names[:8])}"
            raise RequestError(f"no key {key!r} in {path}", hint)
        keys, value = (*keys, step), value[step]
        rest = rest[len(step) + 1 :]
    if rest or not (_is_state_dict(value) or _is_module(value)):
        raise RequestError(f"what stands under the key {key!r} of {path} is not a state dict")
    return keys, value, ()


def _is_state_dict(value: Any) -> bool:
    """Whether it is a dict of names with a tensor in it, and none around another: an `_extra_state` may hold any."""
    return (
        isinstance(value, dict)
        and any(isinstance(item, pickles.Tensor) for item in value.values())
        and all(isinstance(name, str) for name in value)
        and not any(
            isinstance(item, dict)
            and not name.endswith("_extra_state")
            and any(isinstance(inner, pickles.Tensor) for inner in item.values())
            for name, item in value.items()
        )
    )


def resolved(path: Path, value: Any, span_of: Callable[[str], Storage]) -> Any:
    """An inert value with an entry for each tensor in it."""
    return _Values(path, span_of).resolved(value)


class _Values:
    """The values of a pickle with every tensor as the entry it is. What is there twice stays one."""

    def __init__(self, path: Path, span_of: Callable[[str], Storage]) -> None:
        self.path = path
        self.span_of = span_of
        self.made: dict[int, Any] = {}

    def entry(self, name: str, tensor: pickles.Tensor) -> TensorEntry:
        span = self.span_of(tensor.storage.key)
        last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
        needed = (last + 1) * ITEM_BYTES[tensor.dtype] if 0 not in tensor.shape else 0
        if needed > span.nbytes:
            raise FileFormatError(
                f"{self.path}: {name} of shape {list(tensor.shape)} needs {needed:,} bytes, "
                f"and its record holds {span.nbytes:,}"
            )
        return TensorEntry(
            shape=tensor.shape,
            dtype=tensor.dtype,
            stride=tensor.stride,
            offset=tensor.offset,
            storage=span,
            requires_grad=tensor.requires_grad,
            is_parameter=tensor.is_parameter,
        )

    def resolved(self, value: Any, depth: int = 0) -> Any:
        """The value as inert as it was, with entries for tensors. A container is made before what is in it: it may
        hold itself."""
        if depth > pickles.MAX_DEPTH:
            raise FileFormatError(f"{self.path}: nested deeper than {pickles.MAX_DEPTH}")
        if id(value) in self.made:
            return self.made[id(value)]
        made: Any
        match value:
            case pickles.Tensor():
                made = self.entry("a tensor", value)
            case pickles.Opaque():
                made = self.made[id(value)] = pickles.Opaque(value.call, None, how=value.how)
                made.args = self.resolved(value.args, depth + 1)
                made.state = self.resolved(value.state, depth + 1)
                for key, item in value.items:
                    made.items.append((key, self.resolved(item, depth + 1)))
                for item in value.appended:
                    made.appended.append(self.resolved(item, depth + 1))
            case dict():
                made = self.made[id(value)] = type(value)()
                for key, item in value.items():
                    made[key] = self.resolved(item, depth + 1)
                if isinstance(value, pickles.OrderedDict):
                    made.state = self.resolved(value.state, depth + 1)
            case list():
                made = self.made[id(value)] = []
                for item in value:
                    made.append(self.resolved(item, depth + 1))
            case tuple():
                made = tuple([self.resolved(item, depth + 1) for item in value])
            case _:
                return value
        self.made[id(value)] = made
        return made

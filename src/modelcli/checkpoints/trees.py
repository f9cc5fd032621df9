"""From a pickle's inert values to what a checkpoint holds: which of them is the state dict, and where its bytes are."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelcli import record as records
from modelcli.checkpoints import composites, limits, pickles
from modelcli.checkpoints.contents import CompositeEntry, Contents, TensorEntry
from modelcli.errors import FileFormatError, RequestError, UnsafeError, did_you_mean

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
    key: str | None,
    record_text: str | None = None,
    notes: tuple[str, ...] = (),
) -> Contents:
    """What a file of `torch.save` holds."""
    _check_nesting(path, pickled.value)
    keys, found, chosen = _find_state_dict(path, pickled, key)
    types: dict[str, str] = {}
    state_dict = found if isinstance(found, dict) else _tensors_of_module(path, found, types)
    if not isinstance(found, dict) and not state_dict:
        raise _nothing_to_show(path, pickled)
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    extras: dict[str, Any] = {}
    known: dict[int, CompositeEntry] = {}  # one tensor may stand under several names
    longest = limits.NAME_BYTES.value // 4  # a character takes up to four bytes
    for name, item in state_dict.items():
        if len(name) > longest:
            limits.check_name(name, str(path))
        if isinstance(item, TensorEntry):
            tensors[name] = item
        elif composites.makes_tensor(item):
            if id(item) not in known:
                known[id(item)] = composites.entry_of(item, f"{path}: {name}")
            tensors[name] = known[id(item)]
        else:
            extras[name] = item
    state = state_dict.state if isinstance(state_dict, pickles.OrderedDict) else None
    metadata = state.get("_metadata") if isinstance(state, dict) else None
    if not isinstance(metadata, dict):
        metadata = {}
    return Contents(
        path=path,
        format="pth",
        tensors=tensors,
        extras=extras,
        metadata={name: item for name, item in metadata.items() if name != records.METADATA_KEY},
        record=_record(record_text, metadata),
        tree=pickled.value if keys else None,
        key=keys or None,
        foreign=pickled.foreign,
        notes=(*notes, *chosen),
        types=types,
    )


#: What nothing lies in. As a tuple that is made once: a file may have 100,000 of them.
_LEAVES = (TensorEntry, str, int, float, type(None))


def _check_nesting(path: Path, tree: Any) -> None:
    """Raise FileFormatError where values lie in one another deeper than the limit. Each is looked at once."""
    deepest = limits.NESTING.value
    seen: set[int] = set()
    stack = [(1, iter((tree,)))]
    while stack:
        depth, values = stack[-1]
        for value in values:
            if isinstance(value, _LEAVES) or id(value) in seen:
                continue
            seen.add(id(value))
            if depth > deepest:
                raise limits.NESTING.exceeded(f"{path}: the tree of its values", f"more than {deepest:,} levels")
            stack.append((depth + 1, _within(value)))
            break
        else:
            stack.pop()


def _within(value: Any) -> Iterator[Any]:
    """What lies directly in a value."""
    match value:
        case dict():
            yield from value.keys()
            yield from value.values()
            if isinstance(value, pickles.OrderedDict):
                yield value.state
        case list() | tuple():
            yield from value
        case pickles.Opaque():
            yield from (value.call, value.args, value.state, *value.appended)
            for pair in value.items:
                yield from pair


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
        # One value may stand under many names, and is looked at once.
        known: dict[int, bool] = {}
        for value in tree.values():
            if id(value) not in known:
                known[id(value)] = _is_state_dict(value) or _is_module(value)
        fitting = [name for name, value in tree.items() if isinstance(name, str) and known[id(value)]]
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
        f"a dict with the keys {', '.join(map(reprlib.repr, list(tree)[:6]))}"
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
    # Modules still to be looked at, with their prefix and what they lie in; children stand on it last first.
    stack: list[tuple[Any, str, tuple[int, ...]]] = [(root, "", ())]
    while stack:
        module, prefix, above = stack.pop()
        limits.NESTING.check(len(above), f"{path}: its tree of modules")
        limits.check_name(prefix, str(path))
        if isinstance(module.call, pickles.Global):
            types[prefix.removesuffix(".")] = module.call.name
        hidden = _names_in_set(module.state.get("_non_persistent_buffers_set"))
        for table in ("_parameters", "_buffers"):
            for name, tensor in module.state[table].items():
                if isinstance(name, str) and _is_tensor(tensor) and name not in hidden:
                    found[prefix + name] = tensor
        inside = (*above, id(module))
        children = [
            (child, f"{prefix}{name}.", inside)
            for name, child in module.state["_modules"].items()
            if isinstance(name, str) and _is_module(child) and id(child) not in inside
        ]
        stack += reversed(children)
        limits.NODES.check(len(types) + len(found) + len(stack), f"{path}: its tree of modules")
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
    if not isinstance(value, dict) or not any(map(_is_tensor, value.values())):
        return False
    inner: dict[int, bool] = {}
    for name, item in value.items():
        if not isinstance(name, str):
            return False
        if isinstance(item, dict) and not name.endswith("_extra_state"):
            if id(item) not in inner:
                inner[id(item)] = any(map(_is_tensor, item.values()))
            if inner[id(item)]:
                return False
    return True


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorEntry) or composites.makes_tensor(value)

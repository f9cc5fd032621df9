"""From a pickle's inert values to what a checkpoint holds: which of them is the state dict, and where its bytes are."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelcli import record as records
from modelcli.blueprints import listed
from modelcli.checkpoints import carried, composites, deepspeed, limits, pickled_modules, pickles
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
    notes = (*notes, *deepspeed.notes_of(path, pickled.value))
    keys, found, chosen = _find_state_dict(path, pickled, key)
    whole = None if isinstance(found, dict) else pickled_modules.read(path, found, pickled.budget)
    state_dict = found if whole is None else whole.tensors
    if whole is not None and not state_dict:
        raise _nothing_to_show(path, pickled)
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    extras: dict[str, Any] = {}
    known: dict[int, CompositeEntry] = {}  # one tensor may stand under several names
    limits.check_names(state_dict, str(path))
    for name, item in state_dict.items():
        if isinstance(item, TensorEntry):
            tensors[name] = item
        elif composites.makes_tensor(item):
            if id(item) not in known:
                known[id(item)] = composites.entry_of(item, f"{path}: {name}", pickled.budget)
            tensors[name] = known[id(item)]
        else:
            extras[name] = item
    unseen = tuple(name for name, item in extras.items() if composites.may_be_tensor(item))
    seen_through = {name: item for name, item in extras.items() if not composites.may_be_tensor(item)}
    hidden = tuple(name for name, item in seen_through.items() if _holds_tensors(item, pickled.budget))
    attributes = dict.fromkeys(name for name, value in pickled.attributes if _holds_tensors(value, pickled.budget))
    told = _told_of(unseen, hidden, tuple(attributes))
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
        record=_record(path, record_text, metadata),
        tree=pickled.value if keys else None,
        key=keys or None,
        foreign=pickled.foreign,
        notes=(*notes, *chosen, *told, *(() if whole is None else whole.notes)),
        types={} if whole is None else whole.types,
        kinds={} if whole is None else whole.kinds,
        order=tuple(state_dict) if extras else (),
        unseen=unseen,
        hidden=(*hidden, *(f"the attribute {name!r} of a tensor" for name in attributes)),
    )


def _told_of(unseen: Sequence[str], hidden: Sequence[str], attributes: Sequence[str]) -> Iterator[str]:
    """What is to be told of tensors that have no row."""
    if unseen:
        yield f"{listed(unseen, 4)} {_is_or_are(unseen)} made by calls that are not followed here: no row shows what of"
    if hidden:
        yield f"{listed(hidden, 4)} hold{'s' if len(hidden) == 1 else ''} tensors that have no row of their own"
    if attributes:
        yield f"tensors have attributes with tensors in them ({listed(attributes, 4)}), which no state dict loads"


def _is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _holds_tensors(value: Any, budget: limits.Budget) -> bool:
    """Whether tensors lie in a value: weights that a quantized module packs, an object that only code could make.

    Many entries may have one large value in common: each look through it is paid for.
    """
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, TensorEntry) or composites.may_be_tensor(item):
            return True
        if not isinstance(item, _LEAVES) and id(item) not in seen:
            seen.add(id(item))
            within = list(_within(item))
            budget.spend(len(within))
            stack += within
    return False


#: What nothing lies in. As a tuple that is made once: a file may have 100,000 of them.
_LEAVES = (TensorEntry, str, int, float, bytes, type(None), pickles.Global, pickles.StorageRef)


def _check_nesting(path: Path, tree: Any) -> None:
    """Raise FileFormatError where values lie in one another deeper than the limit. Each is looked at once."""
    deepest = limits.NESTING.value
    seen: set[int] = set()
    stack = [(1, iter((tree,)))]
    while stack:
        depth, values = stack[-1]
        for value in values:
            if isinstance(value, _LEAVES) or value == () or id(value) in seen:
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


def _record(path: Path, zip_text: str | None, metadata: Mapping[str, Any]) -> records.Record | None:
    """The embedded record. Where the two copies differ, the zip record wins."""
    for text in (zip_text, metadata.get(records.METADATA_KEY)):
        if (record := carried.record_in(text, str(path))) is not None:
            return record
    return None


def _find_state_dict(
    path: Path, pickled: pickles.Pickle, key: str | None
) -> tuple[tuple[str, ...], Any, tuple[str, ...]]:
    """Where the state dict stands in the tree, the state dict or pickled module, and what to tell of the choice."""
    tree, search = pickled.value, _Search()
    if key is not None:
        return _at_key(path, tree, key)
    if search.finds(tree):
        return (), tree, ()
    if isinstance(tree, dict):
        fitting = [name for name, value in tree.items() if isinstance(name, str) and search.finds(value)]
        candidates = [name for name in STATE_DICT_KEYS if name in fitting]
        candidates += [name for name in fitting if name not in candidates]
        if candidates:
            chosen, *others = candidates
            note = f"took the state dict under {chosen!r} of {path.name}"
            if others:
                note += f"; --key takes another: {listed(others, 6)}"
            notes = [note]
            # Tensors without a dimension are figures of the training: the best loss, a step.
            if beside := [name for name, value in tree.items() if isinstance(value, TensorEntry) and value.shape]:
                notes.append(f"{listed(list(map(str, beside)), 4)} beside it {_is_or_are(beside)} not shown")
            return (chosen,), tree[chosen], tuple(notes)
        if not tree:
            return (), tree, ()
    if pickled.foreign:
        raise _nothing_to_show(path, pickled)
    what = (
        f"a dict with the keys {', '.join(map(reprlib.repr, list(tree)[:6]))}"
        if isinstance(tree, dict)
        else f"a {'tensor' if _is_tensor(tree) else type(tree).__name__}"
    )
    hint = "--key names the one to take: a.b lies in a" if isinstance(tree, dict) else None
    raise FileFormatError(f"{path} holds no state dict: it is {what}", hint)


def state_dict_keys(tree: Any) -> list[str]:
    """What `--key` may name in a training checkpoint: its state dicts, and those that lie one level deeper (`a.b`)."""
    search = _Search()
    found = []
    for name, value in _named(tree):
        if search.finds(value):
            found.append(name)
        else:
            found += [f"{name}.{below}" for below, inner in _named(value) if search.finds(inner)]
    return found


def _named(value: Any) -> list[tuple[str, Any]]:
    return [(name, item) for name, item in value.items() if isinstance(name, str)] if isinstance(value, dict) else []


def _nothing_to_show(path: Path, pickled: pickles.Pickle) -> UnsafeError:
    return UnsafeError(
        f"{path} holds no tensors in a state dict, but objects of {listed(pickled.foreign, 3)}; "
        "to load them would run code",
        "save model.state_dict() where the model was made, and use that file",
    )


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
            hint = did_you_mean(words[0], names) or f"there are: {listed(names, 8)}"
            raise RequestError(f"no key {key!r} in {path}", hint)
        keys, value = (*keys, step), value[step]
        rest = rest[len(step) + 1 :]
    if rest or not _Search().finds(value):
        raise RequestError(f"what stands under the key {key!r} of {path} is not a state dict")
    return keys, value, ()


class _Search:
    """Tells what in a tree holds tensors. One value may stand at many places, and is looked at once."""

    def __init__(self) -> None:
        self._found: dict[int, bool] = {}
        self._tensors: dict[int, bool] = {}

    def finds(self, value: Any) -> bool:
        """Whether a value is a state dict or a module pickled whole."""
        if id(value) not in self._found:
            self._found[id(value)] = pickled_modules.is_module(value) or self._is_state_dict(value)
        return self._found[id(value)]

    def _is_state_dict(self, value: Any) -> bool:
        """Whether it is a dict of names with a tensor in it, and none around another: `_extra_state` may hold any."""
        if not isinstance(value, dict) or not self._has_tensor(value):
            return False
        return all(
            isinstance(name, str)
            and (not isinstance(item, dict) or name.endswith("_extra_state") or not self._has_tensor(item))
            for name, item in value.items()
        )

    def _has_tensor(self, value: dict[Any, Any]) -> bool:
        if id(value) not in self._tensors:
            self._tensors[id(value)] = any(map(_is_tensor, value.values()))
        return self._tensors[id(value)]


def _is_tensor(value: Any) -> bool:
    return composites.is_tensor(value)

"""Where state dicts stand in the tree of values of a training checkpoint, and which of them is meant."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from modelcli.checkpoints import limits
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.torch_pickle import composite_tensors, nested_tensors, pickled_modules, pickles
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque
from modelcli.errors import FileFormatError, RequestError, UnsafeError, did_you_mean
from modelcli.language.quoting import quoted
from modelcli.wording import listed

#: The steps to a value through the dicts (names) and lists (numbers) that it lies in.
Path_ = tuple[str | int, ...]

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
    "ema_model",
    "state_dict_ema",
    "params_ema",
)
#: What such dicts lie in where programs have a dict for all that they save: Composer, Diffusion Policy.
_AROUND = frozenset({"state", "state_dicts", "checkpoint", "ckpt"})
#: How entries begin that are never a model: what an optimizer and the generators of random numbers keep.
_NEVER = ("optim", "rng")
#: Classes of tensors of which each process has a part.
_SHARDED = frozenset(
    {
        "torch.distributed.tensor.DTensor",
        "torch.distributed.tensor._api.DTensor",
        "torch.distributed._tensor.DTensor",
        "torch.distributed._tensor.api.DTensor",
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
        "torch.distributed._shard.sharded_tensor.ShardedTensor",
    }
)
#: So many state dicts are named in an error.
_MOST = 60
#: A module that was pickled whole is taken to have more tensors than any dict beside it.
_WHOLE = 1 << 40


@dataclass(frozen=True)
class Found:
    """A state dict, or a module pickled whole: the path to it, how many tensors it has, and of how many elements.

    `is_mixed` says that state dicts of others lie in it as well, which count for themselves.
    """

    path: Path_
    value: Any
    tensors: int
    elements: int
    is_mixed: bool = False

    @property
    def key(self) -> str:
        """The path as `--key` takes it."""
        return key_of(self.path)


def key_of(path: Path_) -> str:
    """A path as `--key` takes it: `models.0`."""
    return ".".join(map(str, path))


def all_in(tree: Any, budget: limits.Budget | None = None) -> list[Found]:
    """Every state dict in a tree, those at the top first; what an optimizer keeps is left out.

    Each value is looked into once. `budget` pays for the paths, of which a small file can make long ones.
    """
    search = _Search()
    found: list[Found] = []
    looked_into: set[int] = set()
    level: list[tuple[Path_, Any]] = [((), tree)]
    while level:
        deeper: list[tuple[Path_, Any]] = []
        for path, value in level:
            one = search.found(path, value)
            if one is not None:
                found.append(one)
            if (one is not None and not one.is_mixed) or id(value) in looked_into:
                continue
            looked_into.add(id(value))
            for step, item in _items(value):
                if isinstance(item, _CONTAINERS) and _holds_anything(item):
                    if budget is not None:
                        budget.spend(len(path) + 1)
                    deeper.append(((*path, step), item))
        level = deeper
    return found


_CONTAINERS = (dict, list, tuple, Opaque)


def _holds_anything(value: Any) -> bool:
    """Whether a state dict or a module could be in a value at all: of empty ones a small file can have very many."""
    if not isinstance(value, Opaque):
        return bool(value)
    return bool(value.state) or (isinstance(value.args, tuple) and bool(value.args) and isinstance(value.args[0], dict))


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    """What may hold a state dict in a value, with the step to it."""
    if isinstance(value, dict):
        if "state" in value and "param_groups" in value:
            return
        yield from (
            (name, item) for name, item in value.items() if isinstance(name, str) and not name.startswith(_NEVER)
        )
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


class _Search:
    """Tells what is a state dict. One value may stand at many places, and is looked at once."""

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[int, int, bool] | None] = {}
        self._has_tensor: dict[int, bool] = {}

    def found(self, path: Path_, value: Any) -> Found | None:
        """A value as a state dict or a module pickled whole; None for what is neither."""
        if id(value) not in self._sizes:
            self._sizes[id(value)] = self._size(value)
        size = self._sizes[id(value)]
        return None if size is None else Found(path, value, *size)

    def _size(self, value: Any) -> tuple[int, int, bool] | None:
        if pickled_modules.is_module(value):
            return _WHOLE, 0, False
        if not isinstance(value, dict) or not self._holds_tensor(value):
            return None
        if not all(isinstance(name, str) for name in value):
            return None
        is_mixed = any(self._is_around_tensors(name, item) for name, item in value.items())
        shapes = [
            item.shape if isinstance(item, TensorEntry) else None
            for item in value.values()
            if composite_tensors.is_tensor(item)
        ]
        if is_mixed:  # tensors without a dimension are figures of training then: the best loss, a step
            shapes = [shape for shape in shapes if shape != ()]
        return len(shapes), sum(prod(shape or ()) for shape in shapes), is_mixed

    def _is_around_tensors(self, name: str, item: Any) -> bool:
        """Whether an entry is a dict of tensors by itself: `_extra_state` may hold any."""
        return isinstance(item, dict) and not name.endswith("_extra_state") and self._holds_tensor(item)

    def _holds_tensor(self, value: dict[Any, Any]) -> bool:
        if id(value) not in self._has_tensor:
            self._has_tensor[id(value)] = any(map(composite_tensors.is_tensor, value.values()))
        return self._has_tensor[id(value)]


# --- the choice ----------------------------------------------------------------------------------------------------


def find(path: Path, pickled: pickles.Pickle, key: str | None) -> tuple[Path_, Any, tuple[str, ...]]:
    """The path to the state dict or pickled module that is meant, that itself, and what to tell of the choice.

    Raises RequestError where several may be meant, or `key` names none; FileFormatError or UnsafeError where there is
    none.
    """
    tree = pickled.value
    if key is not None:
        return _at_key(path, tree, key)
    one = _Search().found((), tree)
    if (one is not None and not one.is_mixed) or tree == {}:
        return (), tree, ()
    found = all_in(tree, pickled.budget)
    if not found:
        raise _none(path, pickled)
    chosen = _chosen(path, found)
    others = [other.key for other in found if other is not chosen and not _is_within(other, chosen) and other.path]
    notes = []
    if chosen.path:
        note = f"took the state dict under {chosen.key!r} of {path.name}"
        notes.append(f"{note}; --key takes another: {listed(others, 6)}" if others else note)
    if beside := _beside(tree, chosen.path):
        notes.append(f"{listed(beside, 4)} beside it {'is' if len(beside) == 1 else 'are'} not shown")
    return chosen.path, chosen.value, tuple(notes)


def _beside(tree: Any, path: Path_) -> list[str]:
    """Tensors at the top of a file whose state dict lies deeper; one without a dimension is a figure of training."""
    if not path or not isinstance(tree, dict):
        return []
    return [str(name) for name, value in tree.items() if isinstance(value, TensorEntry) and value.shape]


def left_out_by_guess(tree: Any, path: Path_, key: str | None) -> list[str]:
    """Tensors at the top of a file that may belong to the model: its state dict has no usual name, and nobody named it.

    Generators' states and what an optimizer keeps are none of a model's.
    """
    if key is not None or _rank(path) is not None:
        return []
    return [name for name in _beside(tree, path) if not name.startswith(_NEVER)]


def may_be_of_a_model(name: str, value: Any, budget: limits.Budget) -> bool:
    """Whether tensors lie in a value that may be a model's; what an optimizer or a generator keeps is not."""
    is_of_training = isinstance(value, dict) and "state" in value and "param_groups" in value
    return not name.startswith(_NEVER) and not is_of_training and nested_tensors.may_hold_tensors(value, budget)


def _is_within(one: Found, other: Found) -> bool:
    return len(one.path) > len(other.path) and one.path[: len(other.path)] == other.path


def _chosen(path: Path, found: Sequence[Found]) -> Found:
    """The state dict that is meant: under one of the usual names, else the largest by far.

    Raises RequestError where that would leave out what may be meant as well.
    """
    whole = [one for one in found if not one.is_mixed]
    usual = sorted((one for one in whole if _rank(one.path) is not None), key=lambda one: _rank(one.path) or ())
    if usual:
        around = [one for one in found if one.is_mixed and _is_within(usual[0], one)]
        larger = next((one for one in around if _like_a_module(one) > usual[0].tensors), None)
        if larger is not None:  # a state dict with a part of itself, or of another, among its tensors
            return larger
        if 2 * usual[0].tensors >= max((one.tensors for one in whole if one.tensors != _WHOLE), default=0):
            return usual[0]
        raise _several(path, whole)
    best = max(found, key=lambda one: (one.tensors, one.elements, one.is_mixed))
    rivals = {id(one.value): one for one in whole if one.value is not best.value and not _is_within(one, best)}
    if rivals:
        less = sum(one.tensors for one in rivals.values())
        # What lies in one dict with it may be the rest of the same model.
        is_alone = not any(one.path[:1] == best.path[:1] for one in rivals.values())
        if best.tensors < 4 * less or not is_alone:
            raise _several(path, whole)
    return best


def _like_a_module(one: Found) -> int:
    """How many tensors have names as modules give them, `layer1.0.weight`: figures of training have one word."""
    return sum("." in name and composite_tensors.is_tensor(value) for name, value in one.value.items())


def _rank(path: Path_) -> tuple[int, ...] | None:
    """How usual a place is, the usual ones first; None for one that is not."""
    names = [step for step in path if step not in _AROUND]
    if not names or any(step not in STATE_DICT_KEYS for step in names) or path[-1] in _AROUND:
        return None
    return tuple(STATE_DICT_KEYS.index(str(step)) for step in names)


class SeveralStateDictsError(RequestError):
    """None of several state dicts is the one that must be meant; `keys` are what `--key` takes."""

    keys: tuple[str, ...] = ()


def _several(path: Path, found: Sequence[Found]) -> RequestError:
    sizes = [f"--key {quoted(one.key)}{_size(one)}" for one in found]
    error = SeveralStateDictsError(
        f"{path} holds {len(found)} state dicts, and each may be meant", f"name one: {listed(sizes, _MOST)}"
    )
    error.keys = tuple(one.key for one in found)
    return error


def _size(one: Found) -> str:
    if one.tensors == _WHOLE:
        return ""
    return " (1 tensor)" if one.tensors == 1 else f" ({one.tensors} tensors)"


def _none(path: Path, pickled: pickles.Pickle) -> FileFormatError | UnsafeError:
    """The error for a file without a state dict, which says what it is instead."""
    tree = pickled.value
    if pickled.foreign:
        return part_of_a_rank(path, pickled) or nothing_to_show(path, pickled)
    what = (
        f"a dict with the keys {', '.join(map(reprlib.repr, list(tree)[:6]))}"
        if isinstance(tree, dict)
        else f"a {'tensor' if composite_tensors.is_tensor(tree) else type(tree).__name__}"
    )
    return FileFormatError(
        f"{path} holds no state dict: it is {what}",
        "a state dict is a dict of names and tensors, as state_dict() gives",
    )


def is_sharded(value: Any) -> bool:
    """Whether a value is a tensor of which each process has a part."""
    if not isinstance(value, Opaque):
        return False
    named = (arg for arg in value.args[:3] if isinstance(arg, Global)) if isinstance(value.args, tuple) else ()
    return any(kind.dotted in _SHARDED for kind in (value.call, *named) if isinstance(kind, Global))


def part_of_a_rank(path: Path, pickled: pickles.Pickle) -> FileFormatError | None:
    """The error for a file that one process of several wrote: a DTensor or ShardedTensor in it is a part of a tensor.

    None where the file names no such class.
    """
    kind = next((name for name in pickled.foreign if name in _SHARDED), None)
    if kind is None:
        return None
    return FileFormatError(
        f"{path} holds what one process had of its tensors ({kind.rpartition('.')[2]}), and not the whole",
        "in the program that made it: torch.distributed.checkpoint.save(state_dict, checkpoint_id=folder), and name "
        "the folder; or get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) and torch.save",
    )


def nothing_to_show(path: Path, pickled: pickles.Pickle) -> UnsafeError:
    """The error for a file that holds objects, and tensors at most inside of these."""
    return UnsafeError(
        f"{path} holds no tensors in a state dict, but objects of {listed(pickled.foreign, 3)}; "
        "to load them would run code",
        "save model.state_dict() where the model was made, and use that file",
    )


def _at_key(path: Path, tree: Any, key: str) -> tuple[Path_, Any, tuple[str, ...]]:
    keys: Path_ = ()
    value, rest = tree, key
    while rest and isinstance(value, dict | list | tuple):
        words = rest.split(".")
        if isinstance(value, dict):
            # A key may have dots of its own: the longest that is there is meant.
            steps = (".".join(words[:count]) for count in range(len(words), 0, -1))
            step = next((step for step in steps if step in value), None)
            if step is None:
                names = [name for name in value if isinstance(name, str)]
                raise RequestError(
                    f"no key {key!r} in {path}", did_you_mean(words[0], names) or f"there are: {listed(names, 8)}"
                )
            keys, value, rest = (*keys, step), value[step], rest[len(step) + 1 :]
        else:
            if not words[0].isdecimal() or len(words[0]) > 9 or int(words[0]) >= len(value):
                where = key_of(keys) or "the file"
                raise RequestError(
                    f"no key {key!r} in {path}", f"{where} is a list of {len(value)}: a number from 0 names one of them"
                )
            keys, value, rest = (*keys, int(words[0])), value[int(words[0])], rest[len(words[0]) + 1 :]
    if rest or _Search().found(keys, value) is None:
        there = [one.key for one in all_in(tree) if one.path]
        hint = f"state dicts stand under: {listed(there, _MOST)}" if there else None
        raise RequestError(f"what stands under the key {key!r} of {path} is not a state dict", hint)
    return keys, value, ()


def keys_in(tree: Any) -> list[str]:
    """What `--key` may name in a training checkpoint."""
    return [one.key for one in all_in(tree) if one.path]

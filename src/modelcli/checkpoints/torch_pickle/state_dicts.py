"""Find the state dicts in a training checkpoint, and choose the one that the user means."""

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
from modelcli.checkpoints.torch_pickle.allow_list import SHARDED_CLASSES
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque
from modelcli.errors import FileFormatError, RequestError, UnsafeError, did_you_mean
from modelcli.language.quoting import quoted
from modelcli.wording import listed

#: The keys of dicts and indices of lists that lead to a value.
Path_ = tuple[str | int, ...]

#: The keys under which training checkpoints keep the state dict, the most frequent first.
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
#: The keys of dicts that contain such keys, for programs that put everything into one dict: Composer, Diffusion Policy.
_OUTER_KEYS = frozenset({"state", "state_dicts", "checkpoint", "ckpt"})
#: The beginnings of keys that never hold a model: the states of optimizers and random number generators.
_NOT_A_MODEL = ("optim", "rng")
#: What to do instead of saving the parts that a process has.
_SAVE_WHOLE = (
    "in the program that made it, use torch.distributed.checkpoint.save(state_dict, checkpoint_id=folder), and name "
    "the folder; or torch.save of get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
)
#: The most state dicts that an error lists.
_MAX_LISTED = 60
#: The number of tensors that a pickled module counts as, so that it has more than any dict beside it.
_MODULE_TENSORS = 1 << 40


@dataclass(frozen=True)
class Found:
    """A state dict or a pickled module in a training checkpoint.

    Attributes:
        path: where it is.
        value: the state dict or module.
        tensors: the number of its tensors.
        elements: the number of their elements.
        is_mixed: whether it also contains other dicts of tensors, which are candidates themselves.
    """

    path: Path_
    value: Any
    tensors: int
    elements: int
    is_mixed: bool = False

    @property
    def key(self) -> str:
        """The path as the value of `--key`."""
        return key_of(self.path)


def key_of(path: Path_) -> str:
    """Return a path as the value of `--key`: `models.0`."""
    return ".".join(map(str, path))


def all_in(tree: Any, budget: limits.Budget | None = None) -> list[Found]:
    """Return all state dicts in a tree, those nearest to the top first, without the states of optimizers.

    Each value is searched once. `budget` is charged for the paths, which can be long even in a small file.
    """
    search = _Search()
    found: list[Found] = []
    searched: set[int] = set()
    level: list[tuple[Path_, Any]] = [((), tree)]
    while level:
        deeper: list[tuple[Path_, Any]] = []
        for path, value in level:
            candidate = search.candidate(path, value)
            if candidate is not None:
                found.append(candidate)
            if (candidate is not None and not candidate.is_mixed) or id(value) in searched:
                continue
            searched.add(id(value))
            for step, item in _items(value):
                if isinstance(item, _CONTAINERS) and _is_not_empty(item):
                    if budget is not None:
                        budget.spend(len(path) + 1)
                    deeper.append(((*path, step), item))
        level = deeper
    return found


_CONTAINERS = (dict, list, tuple, Opaque)


def _is_not_empty(value: Any) -> bool:
    """Whether a value is not empty, so that it may contain a state dict. A small file can have very many empty ones."""
    if not isinstance(value, Opaque):
        return bool(value)
    return bool(value.state) or (isinstance(value.args, tuple) and bool(value.args) and isinstance(value.args[0], dict))


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield the values in a container that may be or contain a state dict, each with its key or index."""
    if isinstance(value, dict):
        if "state" in value and "param_groups" in value:
            return
        yield from (
            (name, item) for name, item in value.items() if isinstance(name, str) and not name.startswith(_NOT_A_MODEL)
        )
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


class _Search:
    """Recognises state dicts. A value that is used many times is examined once."""

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[int, int, bool] | None] = {}
        self._has_tensor: dict[int, bool] = {}

    def candidate(self, path: Path_, value: Any) -> Found | None:
        """Return a value as a candidate if it is a state dict or a pickled module, else None."""
        if id(value) not in self._sizes:
            self._sizes[id(value)] = self._size(value)
        size = self._sizes[id(value)]
        return None if size is None else Found(path, value, *size)

    def _size(self, value: Any) -> tuple[int, int, bool] | None:
        if pickled_modules.is_module(value):
            return _MODULE_TENSORS, 0, False
        if not isinstance(value, dict) or not self._holds_tensor(value):
            return None
        if not all(isinstance(name, str) for name in value):
            return None
        is_mixed = any(self._is_dict_of_tensors(name, item) for name, item in value.items())
        shapes = [
            item.shape if isinstance(item, TensorEntry) else None
            for item in value.values()
            if composite_tensors.is_tensor(item)
        ]
        if is_mixed:  # then tensors without dimensions are values of the training, such as the best loss or a step
            shapes = [shape for shape in shapes if shape != ()]
        return len(shapes), sum(prod(shape or ()) for shape in shapes), is_mixed

    def _is_dict_of_tensors(self, name: str, item: Any) -> bool:
        """Whether an entry is itself a dict of tensors. An `_extra_state` does not count: it may hold anything."""
        return isinstance(item, dict) and not name.endswith("_extra_state") and self._holds_tensor(item)

    def _holds_tensor(self, value: dict[Any, Any]) -> bool:
        if id(value) not in self._has_tensor:
            self._has_tensor[id(value)] = any(map(composite_tensors.is_tensor, value.values()))
        return self._has_tensor[id(value)]


# --- the choice ----------------------------------------------------------------------------------------------------


def find(path: Path, pickled: pickles.Pickle, key: str | None) -> tuple[Path_, Any, tuple[str, ...]]:
    """Find the state dict or pickled module to use.

    Args:
        path: the file.
        pickled: its pickle.
        key: the value of `--key`, or None.

    Returns:
        The path in the tree, the state dict or module, and notes about the choice.

    Raises:
        RequestError: several state dicts are possible, or `key` does not name one.
        FileFormatError, UnsafeError: there is none.
    """
    tree = pickled.value
    if key is not None:
        return _at_key(path, tree, key)
    top = _Search().candidate((), tree)
    if (top is not None and not top.is_mixed) or tree == {}:
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
    """Return the tensors at the top of a file whose state dict is deeper, except for those without dimensions."""
    if not path or not isinstance(tree, dict):
        return []
    return [str(name) for name, value in tree.items() if isinstance(value, TensorEntry) and value.shape]


def left_out_by_guess(tree: Any, path: Path_, key: str | None) -> list[str]:
    """Return the tensors at the top of a file that may belong to the model although they are not in its state dict.

    There are none if the user named the state dict or it has a usual name. States of optimizers and random number
    generators do not count.
    """
    if key is not None or _rank(path) is not None:
        return []
    return [name for name in _beside(tree, path) if not name.startswith(_NOT_A_MODEL)]


def may_be_of_a_model(name: str, value: Any, budget: limits.Budget) -> bool:
    """Whether a value contains tensors that may belong to a model, not to an optimizer or random number generator."""
    is_of_training = isinstance(value, dict) and "state" in value and "param_groups" in value
    return not name.startswith(_NOT_A_MODEL) and not is_of_training and nested_tensors.may_hold_tensors(value, budget)


def _is_within(inner: Found, outer: Found) -> bool:
    return len(inner.path) > len(outer.path) and inner.path[: len(outer.path)] == outer.path


def _chosen(path: Path, found: Sequence[Found]) -> Found:
    """Return the state dict to use: the one under a usual name, else the largest if it is so by far.

    Raises RequestError if another one may be meant as well.
    """
    whole = [candidate for candidate in found if not candidate.is_mixed]
    usual = sorted(
        (candidate for candidate in whole if _rank(candidate.path) is not None),
        key=lambda candidate: _rank(candidate.path) or (),
    )
    if usual:
        enclosing = [outer for outer in found if outer.is_mixed and _is_within(usual[0], outer)]
        larger = next((outer for outer in enclosing if _module_tensors(outer) > usual[0].tensors), None)
        if larger is not None:  # a state dict that contains another dict of tensors under a usual name
            return larger
        if 2 * usual[0].tensors >= max(
            (candidate.tensors for candidate in whole if candidate.tensors != _MODULE_TENSORS), default=0
        ):
            return usual[0]
        raise _several(path, whole)
    best = max(found, key=lambda candidate: (candidate.tensors, candidate.elements, candidate.is_mixed))
    rivals = {
        id(candidate.value): candidate
        for candidate in whole
        if candidate.value is not best.value and not _is_within(candidate, best)
    }
    if rivals:
        less = sum(candidate.tensors for candidate in rivals.values())
        # Other state dicts in the same dict may be the rest of the same model.
        is_alone = not any(candidate.path[:1] == best.path[:1] for candidate in rivals.values())
        if best.tensors < 4 * less or not is_alone:
            raise _several(path, whole)
    return best


def _module_tensors(found: Found) -> int:
    """Return the number of tensors with names of modules, such as `layer1.0.weight`; training values have no dot."""
    return sum("." in name and composite_tensors.is_tensor(value) for name, value in found.value.items())


def _rank(path: Path_) -> tuple[int, ...] | None:
    """Return a sort key for usual paths of state dicts, the most usual first; None for an unusual path."""
    names = [step for step in path if step not in _OUTER_KEYS]
    if not names or any(step not in STATE_DICT_KEYS for step in names) or path[-1] in _OUTER_KEYS:
        return None
    return tuple(STATE_DICT_KEYS.index(str(step)) for step in names)


class SeveralStateDictsError(RequestError):
    """The error if several state dicts are possible. `keys` are the values of `--key` for them."""

    keys: tuple[str, ...] = ()


def _several(path: Path, found: Sequence[Found]) -> RequestError:
    sizes = [f"--key {quoted(candidate.key)}{_size(candidate)}" for candidate in found]
    error = SeveralStateDictsError(
        f"{path} contains {len(found)} state dicts, and modelcli cannot tell which to use",
        f"name one: {listed(sizes, _MAX_LISTED)}",
    )
    error.keys = tuple(candidate.key for candidate in found)
    return error


def _size(candidate: Found) -> str:
    if candidate.tensors == _MODULE_TENSORS:
        return ""
    return " (1 tensor)" if candidate.tensors == 1 else f" ({candidate.tensors} tensors)"


def _none(path: Path, pickled: pickles.Pickle) -> FileFormatError | UnsafeError:
    """Return the error for a file without a state dict, which states what it contains instead."""
    tree = pickled.value
    if pickled.foreign:
        return part_of_a_rank(path, pickled) or nothing_to_show(path, pickled)
    what = (
        f"a dict with the keys {', '.join(map(reprlib.repr, list(tree)[:6]))}"
        if isinstance(tree, dict)
        else f"a {'tensor' if composite_tensors.is_tensor(tree) else type(tree).__name__}"
    )
    return FileFormatError(
        f"{path} contains no state dict: it is {what}",
        "save model.state_dict(), which is a dict of tensors by name",
    )


def is_sharded(value: Any) -> bool:
    """Whether a value is a tensor of which each process has only a part."""
    if not isinstance(value, Opaque):
        return False
    named = (arg for arg in value.args[:3] if isinstance(arg, Global)) if isinstance(value.args, tuple) else ()
    return any(kind.dotted in SHARDED_CLASSES for kind in (value.call, *named) if isinstance(kind, Global))


def part_of_a_rank(path: Path, pickled: pickles.Pickle) -> FileFormatError | None:
    """Return the error for a file with parts of tensors (DTensor or ShardedTensor) that one of several processes wrote.

    None if the file names no such class.
    """
    kind = next((name for name in pickled.foreign if name in SHARDED_CLASSES), None)
    if kind is None:
        return None
    from modelcli.checkpoints.rank_files import names

    if names.rank_of(path.name) is not None:
        hint = f"name its folder, in which modelcli joins the files of all ranks: {path.parent}/"
    else:
        hint = _SAVE_WHOLE
    return FileFormatError(
        f"{path} contains only the parts of tensors that one process had ({kind.rpartition('.')[2]})", hint
    )


def nothing_to_show(path: Path, pickled: pickles.Pickle) -> UnsafeError:
    """Return the error for a file that contains objects, but no state dict."""
    return UnsafeError(
        f"{path} contains no state dict, but objects of {listed(pickled.foreign, 3)}, and loading them would run code",
        "load the file with the program that made it, save model.state_dict() there, and use that file",
    )


def _at_key(path: Path, tree: Any, key: str) -> tuple[Path_, Any, tuple[str, ...]]:
    keys: Path_ = ()
    value, rest = tree, key
    while rest and isinstance(value, dict | list | tuple):
        words = rest.split(".")
        if isinstance(value, dict):
            # A key may contain dots, so try the longest one first.
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
                    f"no key {key!r} in {path}", f"{where} is a list: use an index from 0 to {len(value) - 1}"
                )
            keys, value, rest = (*keys, int(words[0])), value[int(words[0])], rest[len(words[0]) + 1 :]
    if rest or _Search().candidate(keys, value) is None:
        others = keys_in(tree)
        hint = f"the file has state dicts under: {listed(others, _MAX_LISTED)}" if others else None
        raise RequestError(f"the value under the key {key!r} of {path} is not a state dict", hint)
    return keys, value, ()


def keys_in(tree: Any) -> list[str]:
    """Return the values that `--key` can have for a training checkpoint."""
    return [found.key for found in all_in(tree) if found.path]

"""The state dict of a script while it is written: it is called `state`, and its keys have an order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from modelcli.live.script.source_text import STATEMENTS, deleted, loop, mapping, quoted
from modelcli.model.paths import joined, parent_of


class State:
    """What is known of `state` while the script is written.

    `names` are its keys in their order; `wanted` are those after the edit that is being told, as modelcli writes them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.wanted = self.names

    def delete(self, gone: Sequence[str], paths: Sequence[str] = ()) -> list[str]:
        """Take keys out; by their prefix where they are many and all those below `paths`."""
        below = [name for name in self.names if any(name.startswith(f"{path}.") for path in paths)]
        self.names = [name for name in self.names if name not in set(gone)]
        if len(gone) <= STATEMENTS or set(below) != set(gone):
            return deleted(gone)
        prefixes = [quoted(f"{path}.") for path in paths]
        prefix = prefixes[0] if len(prefixes) == 1 else f"({', '.join(prefixes)})"
        return [f"state = {{key: value for key, value in state.items() if not key.startswith({prefix})}}"]

    def rename(self, names: Mapping[str, str]) -> list[str]:
        """Give keys other names, in their places; `names` has all keys."""
        self.names = [names.get(name, name) for name in self.names]
        return _renamed(names)

    def put(self, prefix: str, own: Sequence[str], gone: Sequence[str] = ()) -> list[str]:
        """Put in the tensors of `new`, whose own names are given, in the place of keys that go."""
        if not own:
            return self.delete(gone) or ["# a module without tensors: nothing to do"]
        names = [prefix + name for name in own]
        pairs = f"{quoted(prefix)} + key: value for key, value in new.state_dict().items()"
        left = [name for name in gone if name not in names]
        if self._is_in_order([*(name for name in self.names if name not in left), *names]):
            deleted = self.delete(left, [prefix.removesuffix(".")])
            self.names = list(dict.fromkeys([*self.names, *names]))
            return [*deleted, f"state |= {{{pairs}}}"]
        deleted = self.delete([name for name in self.names if name in {*gone, *names}], [prefix.removesuffix(".")])
        behind = self.wanted[self.wanted.index(names[-1]) + 1 :]
        follower = next((name for name in behind if name in self.names), None)
        at = len(self.names) if follower is None else self.names.index(follower)
        self.names[at:at] = names
        if follower is None:
            return [*deleted, f"state |= {{{pairs}}}"]
        return [
            *deleted,
            f"at = list(state).index({quoted(follower)})",
            "items = list(state.items())",
            f"items[at:at] = {{{pairs}}}.items()",
            "state = dict(items)",
        ]

    def sort(self) -> list[str]:
        """Put the keys into the order that is wanted, where the edit has not done so."""
        if self._is_in_order(self.names):
            return []
        there = set(self.names)
        wanted = [name for name in self.wanted if name in there]
        self.names = [*(there - set(wanted)), *wanted]
        return loop("key", wanted, "state[key] = state.pop(key)")

    def _is_in_order(self, names: Iterable[str]) -> bool:
        """Whether keys, as often as they are set, are in the order that is wanted, as far as that is known yet."""
        names = list(dict.fromkeys(names))
        wanted = set(self.wanted)
        there = set(names)
        return [name for name in names if name in wanted] == [name for name in self.wanted if name in there]


def _number(name: str, holder: str) -> int:
    """The number of the child or tensor of a module that a key is, or lies below; -1 for none."""
    number = name.removeprefix(joined(holder, "")).partition(".")[0]
    return int(number) if number.isdigit() else -1


def moved(names: Sequence[str], holder: str, shift: Callable[[int], int], state: State) -> list[str]:
    """New names for the keys below numbered children of a module."""
    prefix, new_names = joined(holder, ""), {}
    for name in names:
        if name.startswith(prefix) and (number := _number(name, holder)) >= 0:
            _, dot, rest = name.removeprefix(prefix).partition(".")
            new_names[name] = f"{prefix}{shift(number)}{dot}{rest}"
    if all(name == new for name, new in new_names.items()):
        return []
    return state.rename({name: new_names.get(name, name) for name in names})


def _renamed(names: Mapping[str, str]) -> list[str]:
    """The keys under other names: by their prefix where that tells it, else one by one."""
    moved = {name: new for name, new in names.items() if name != new}
    name, new = next(iter(moved.items()))
    while name and new and name.rpartition(".")[2] == new.rpartition(".")[2]:
        name, new = parent_of(name), parent_of(new)
    old_prefix, new_prefix = (f"{path}." if path else "" for path in (name, new))

    def by_prefix(key: str) -> str:
        return new_prefix + key.removeprefix(old_prefix) if key.startswith(old_prefix) else key

    if all(by_prefix(key) == wanted for key, wanted in names.items()):
        return [_by_prefix(old_prefix, new_prefix, all(key.startswith(old_prefix) for key in names))]
    return [
        *mapping("names", moved.items()),
        "state = {names.get(key, key): value for key, value in state.items()}",
    ]


def _by_prefix(old: str, new: str, everywhere: bool) -> str:
    key = f"key.removeprefix({quoted(old)})" if old else "key"
    key = f"{quoted(new)} + {key}" if new else key
    # removeprefix alone leaves other keys as they are.
    condition = "" if everywhere or not new else f" if key.startswith({quoted(old)}) else key"
    return f"state = {{{key}{condition}: value for key, value in state.items()}}"

"""The keys of `state`, the variable of a script that holds the state dict, and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from modelcli.live.script.source_text import STATEMENTS, delete_statements, dict_statement, loop, quoted
from modelcli.model.paths import joined, parent_of


class State:
    """The keys that `state` has at this point of the script.

    Attributes:
        names: its keys in their order.
        order_after_edit: the keys in the order in which modelcli writes them after the edit in progress.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.order_after_edit = self.names

    def delete(self, gone: Sequence[str], paths: Sequence[str] = ()) -> list[str]:
        """Delete keys. If there are many, and they are all keys below `paths`, one statement deletes them by prefix."""
        below = [name for name in self.names if any(name.startswith(f"{path}.") for path in paths)]
        self.names = [name for name in self.names if name not in set(gone)]
        if len(gone) <= STATEMENTS or set(below) != set(gone):
            return delete_statements(gone)
        prefixes = [quoted(f"{path}.") for path in paths]
        prefix = prefixes[0] if len(prefixes) == 1 else f"({', '.join(prefixes)})"
        return [f"state = {{key: value for key, value in state.items() if not key.startswith({prefix})}}"]

    def rename(self, names: Mapping[str, str]) -> list[str]:
        """Rename keys without changing their order. `names` maps every key to its new name, or to itself."""
        self.names = [names.get(name, name) for name in self.names]
        return _rename_statements(names)

    def put_new_module(self, prefix: str, own: Sequence[str], gone: Sequence[str] = ()) -> list[str]:
        """Add the tensors of the module in the variable `new`, where modelcli would put them.

        Args:
            prefix: the prefix of their keys in `state`.
            own: their names in the new module's own state dict.
            gone: the keys that they replace, which are deleted.
        """
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
        behind = self.order_after_edit[self.order_after_edit.index(names[-1]) + 1 :]
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
        """Put the keys into the order that modelcli writes, unless they are in that order already."""
        if self._is_in_order(self.names):
            return []
        there = set(self.names)
        wanted = [name for name in self.order_after_edit if name in there]
        self.names = [*(there - set(wanted)), *wanted]
        return loop("key", wanted, "state[key] = state.pop(key)")

    def _is_in_order(self, names: Iterable[str]) -> bool:
        """Whether those of the keys that exist after the edit are in the order in which modelcli writes them."""
        names = list(dict.fromkeys(names))
        wanted = set(self.order_after_edit)
        there = set(names)
        return [name for name in names if name in wanted] == [name for name in self.order_after_edit if name in there]


def _number(name: str, holder: str) -> int:
    """Return the number of the child of a module that a key belongs to; -1 if it belongs to none with a number."""
    number = name.removeprefix(joined(holder, "")).partition(".")[0]
    return int(number) if number.isdigit() else -1


def renumber_keys(names: Sequence[str], holder: str, shift: Callable[[int], int], state: State) -> list[str]:
    """Rename the keys below the numbered children of a module.

    Args:
        names: the keys of `state`.
        holder: the path of the module.
        shift: returns the new number of a child.
        state: the state dict; the renaming is recorded in it.
    """
    prefix, new_names = joined(holder, ""), {}
    for name in names:
        if name.startswith(prefix) and (number := _number(name, holder)) >= 0:
            _, dot, rest = name.removeprefix(prefix).partition(".")
            new_names[name] = f"{prefix}{shift(number)}{dot}{rest}"
    if all(name == new for name, new in new_names.items()):
        return []
    return state.rename({name: new_names.get(name, name) for name in names})


def _rename_statements(names: Mapping[str, str]) -> list[str]:
    """Return the statements that rename keys: by a common prefix if that gives the same names, else one by one."""
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
        *dict_statement("names", moved.items()),
        "state = {names.get(key, key): value for key, value in state.items()}",
    ]


def _by_prefix(old: str, new: str, everywhere: bool) -> str:
    key = f"key.removeprefix({quoted(old)})" if old else "key"
    key = f"{quoted(new)} + {key}" if new else key
    # removeprefix alone leaves other keys as they are.
    condition = "" if everywhere or not new else f" if key.startswith({quoted(old)}) else key"
    return f"state = {{{key}{condition}: value for key, value in state.items()}}"

"""The module that gets a new child, as far as an edit has to know it to find a place in it.

add, insert and append decide on a `Holder`, whether it is a live module (`modelcli.live.surgery.placing`) or one of a
state-dict model (`StateDictHolder`), so that both get the same names and the same errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from modelcli.edits.picking import parts_below
from modelcli.model.paths import joined
from modelcli.model.state_dict import StateDictModel


class Holder(Protocol):
    """A module that gets a child."""

    @property
    def path(self) -> str: ...

    @property
    def type(self) -> str:
        """Its type, for errors."""
        ...

    @property
    def children(self) -> Sequence[str]:
        """The names of its children, in order."""
        ...

    @property
    def is_sequence(self) -> bool:
        """Whether it is known to be a `Sequential` or `ModuleList`."""
        ...

    def child(self, name: str) -> str | None:
        """Return a child in a few words, for errors; None if there is no child of this name."""
        ...

    def has_tensor(self, name: str) -> bool:
        """Whether a parameter or buffer of its own has this name."""
        ...

    def has_attribute(self, name: str) -> bool:
        """Whether something of its class has this name, so that a child could not be called by it."""
        ...


def is_numbered(holder: Holder) -> bool:
    """Whether a module is a sequence whose children are called 0, 1, 2 and so on."""
    return holder.is_sequence and list(holder.children) == [str(number) for number in range(len(holder.children))]


@dataclass(frozen=True)
class StateDictHolder:
    """A module of a state-dict model."""

    model: StateDictModel
    path: str

    @property
    def is_known(self) -> bool:
        """Whether its type is known: only that of a module that an edit has put in is."""
        return self.model.modules[self.path].info is not None

    @property
    def type(self) -> str:
        info = self.model.modules[self.path].info
        return "(of unknown type)" if info is None or info.type is None else info.type

    @property
    def children(self) -> Sequence[str]:
        return list(self.paths)

    @property
    def paths(self) -> Mapping[str, str]:
        """The path of each child, by its name."""
        return {path.rpartition(".")[2]: path for path in self.model.children[self.path]}

    @property
    def is_sequence(self) -> bool:
        info = self.model.modules[self.path].info
        return info is not None and info.is_sequence

    def child(self, name: str) -> str | None:
        path = self.paths.get(name)
        return None if path is None else parts_below(self.model, [path])[path].brief

    def has_tensor(self, name: str) -> bool:
        return joined(self.path, name) in self.model.tensors

    def has_attribute(self, name: str) -> bool:
        made = self.model.modules[self.path].made
        return made is not None and getattr(made, name, None) is not None

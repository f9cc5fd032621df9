"""What carrying out an edit needs and gives, whichever kind of model it works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from modelcli.live.inputs import Inputs
    from modelcli.model.blueprint import Blueprint

#: An `nn.Module`, or a state-dict model.
Model = TypeVar("Model")


@dataclass(frozen=True)
class Context:
    """What an edit may need to know besides the model.

    Attributes:
        seed: what the values that it draws come from.
        inputs: what the model takes; None where nobody knows.
        trusted: whether it may run code other than that of known libraries.
        blueprint: the model as a blueprint, where there is one already: a handler takes it from `blueprint_of`.
    """

    seed: int
    inputs: Inputs | None
    trusted: bool
    blueprint: Blueprint | None = None


@dataclass(frozen=True)
class Change:
    """What one edit did at one path.

    Attributes:
        path: where, as selectors name it; nothing for the model itself.
        action: the edit's name.
        before: what was there, in a few words.
        after: what is there now.
        params_before: how many parameters that had.
        params_after: how many it has now.
        resolved: on the first change of each edit, its lines with selectors and `_` resolved.
        nbytes: how many bytes before and after, where only these differ.
    """

    path: str
    action: str
    before: str
    after: str
    params_before: int
    params_after: int
    resolved: tuple[str, ...] = ()
    nbytes: tuple[int, int] | None = None


@dataclass(frozen=True)
class Applied(Generic[Model]):
    """What edits gave.

    Attributes:
        model: the edited model, which may be another object than the one that was given.
        changes: what became of each path.
        notes: what there is to say of it.
        inputs: what the model takes now; None where nobody knows.
        lines: the edits with selectors and `_` resolved, each with its number.
    """

    model: Model
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: Inputs | None = None
    lines: list[tuple[int, str]] = field(default_factory=list)


def seed_of(seed: int, number: int) -> int:
    """The seed of edit `number` (from 1) of a model with this seed: `(seed * 1000003 + number) mod 2^63`."""
    return (seed * 1_000_003 + number) % 2**63

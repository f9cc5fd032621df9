"""What applying an edit takes and returns, for both kinds of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from modelcli.errors import ModelcliError

if TYPE_CHECKING:
    from modelcli.edits.base import Edit
    from modelcli.edits.source_models import OpensSources
    from modelcli.live.inputs import Inputs
    from modelcli.model.blueprint import Blueprint

#: An `nn.Module`, or a state-dict model.
Model = TypeVar("Model")


@dataclass(frozen=True)
class Context:
    """What an edit may need besides the model.

    Attributes:
        seed: the seed of its random values.
        inputs: the model's inputs; None if they are not known.
        trusted: whether it may run code other than that of known libraries.
        blueprint: the model's blueprint, if there is one already; handlers call `blueprint_of`.
        sources: opens the other models that an edit names; None where none may be opened, as for a record.
        quantization: what the `config.json` beside the tensors says of how they are quantized; None if it says nothing.
    """

    seed: int
    inputs: Inputs | None
    trusted: bool
    blueprint: Blueprint | None = None
    sources: OpensSources | None = None
    quantization: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Change:
    """What one edit did at one path.

    Attributes:
        path: the path; empty for the model itself.
        action: the edit's name.
        before: what was there, in short.
        after: what is there now.
        params_before: the number of parameters before.
        params_after: the number of parameters now.
        resolved: on the first change of each edit, its lines with selectors and `_` resolved.
        nbytes: the number of bytes before and after, if only these differ.
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
    """The result of edits.

    Attributes:
        model: the edited model, which may be another object than the given one.
        changes: what changed at each path.
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
    """Return the seed of edit `number` (from 1) for a model with this seed: `(seed * 1000003 + number) mod 2^63`."""
    return (seed * 1_000_003 + number) % 2**63


def apply_in_order(
    model: Model,
    edits: Sequence[Edit],
    numbers: Sequence[int],
    inputs: Inputs | None,
    carry_out: Callable[[Model, Edit, int, Inputs | None], Applied[Model]],
) -> Applied[Model]:
    """Carry out edits one after another, each on what the one before it made.

    Args:
        model: what the first edit works on.
        edits: what to carry out.
        numbers: what each edit counts as, which decides what it draws.
        inputs: what the model takes; None if nobody knows.
        carry_out: carries out one edit, given the model, the edit, its number and what the model takes.

    Raises the error of the edit that is wrong, which its message names if there are several.
    """
    changes: list[Change] = []
    notes: list[str] = []
    lines: list[tuple[int, str]] = []
    for position, (edit, number) in enumerate(zip(edits, numbers, strict=True), 1):
        try:
            done = carry_out(model, edit, number, inputs)
        except ModelcliError as error:
            if len(edits) > 1:
                error.message = f"edit {position}, {str(edit)!r}: {error.message}"
            raise
        model, inputs = done.model, done.inputs
        changes += done.changes
        notes += done.notes
        lines += [(number, line) for change in done.changes for line in change.resolved]
    return Applied(model, changes, notes, inputs, lines)

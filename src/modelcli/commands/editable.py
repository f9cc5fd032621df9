"""What edits are carried out on: a live model where the architecture is known, else a state-dict model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from modelcli import resolve
from modelcli.edits import Edit
from modelcli.language.references import CheckpointFile, Source
from modelcli.language.stated_inputs import StatedInputs
from modelcli.model.blueprint import Blueprint

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.record import Record
    from modelcli.edits.applied import Change
    from modelcli.live.training_state import Held
    from modelcli.writing import Plan


class Editable(Protocol):
    """A model that is open for edits, where it comes from, and what was done to it."""

    changes: list[Change]
    notes: list[str]
    seed: int

    @property
    def source(self) -> Source: ...

    @property
    def architecture(self) -> object | None:
        """None where only keys are known."""
        ...

    @property
    def contents(self) -> Contents | None: ...

    @property
    def record(self) -> Record | None: ...

    @property
    def report(self) -> Any | None:
        """How the keys of a checkpoint fitted an architecture; None where there was none to fit."""
        ...

    @property
    def inputs(self) -> StatedInputs | None: ...

    @property
    def parameters_opened(self) -> Mapping[str, Held]: ...

    @property
    def parameters_now(self) -> Mapping[str, Held]: ...

    @property
    def tensors_opened(self) -> Mapping[str, Hashable]: ...

    @property
    def tensors_now(self) -> Mapping[str, Hashable]: ...

    def describe(self) -> Blueprint: ...

    def apply(self, edits: Sequence[Edit], *, trusted: bool = True, place: str = "") -> list[Change]:
        """Carry out edits, all or none. `place` is where one edit stands. Raises RequestError where one is wrong."""
        ...

    def forget_changes(self) -> None:
        """Take all edits so far for granted: `changes` are those of edits from now on."""
        ...

    def plan(self, out: Path, kind: str, *, bare: bool = False, compact: bool = False) -> Plan:
        """What to write, in a format of `writing`."""
        ...

    def lost_values(self) -> list[str]:
        """What there is to tell of values that a narrower dtype cannot hold, after they have been written."""
        ...

    def drawn_values(self) -> list[str]:
        """What there is to tell of values that are in no file and were drawn at random."""
        ...


def open_editable(source: Source, edits: Sequence[Edit] = ()) -> Editable:
    """Open a model for these edits. Nothing is downloaded, and no value is read.

    Raises RequestError, AnswerNoError (a checkpoint that does not fit), UnsafeError, FileFormatError.
    """
    if all(edit.is_for_state_dicts() for edit in edits) and _is_file_alone(source):
        from modelcli.commands import state_dict_models

        if (opened := state_dict_models.opened(source)) is not None:
            return opened
    from modelcli.live import opening

    return opening.open_live(source)


def _is_file_alone(source: Source) -> bool:
    """Whether a source is a checkpoint of which nothing but the file says the architecture."""
    if source.arch is not None or source.weights not in (None, "none"):
        return False
    return isinstance(resolve.reference_of(source), CheckpointFile)

"""What edits are carried out on: a live model where the architecture is known, else a state-dict model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
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
    from modelcli.commands.state_dict_models import OpenStateDict
    from modelcli.edits.applied import Applied
    from modelcli.live.source_models import SourceModels
    from modelcli.live.trace import Traced
    from modelcli.model.parameter_origins import Held
    from modelcli.values.watch import Watch
    from modelcli.writing import Plan


class Editable(Protocol):
    """A model that is open for edits, and where it comes from. `notes` are what there was to say when it was opened."""

    notes: list[str]
    seed: int
    sources: SourceModels
    #: The edits since it was opened, as they were written.
    carried_out: list[Edit]
    #: The folder of a library's model that it was opened from, if it was.
    own_folder: Path | None

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
    def parameters_opened(self) -> Mapping[str, Held]:
        """The parameters that it had when it was opened, in order, if it comes from a training checkpoint."""
        ...

    @property
    def parameters_now(self) -> Mapping[str, Held]:
        """The parameters that it has, in the order of `model.parameters()`."""
        ...

    @property
    def tensors_opened(self) -> Mapping[str, Hashable]: ...

    @property
    def tensors_now(self) -> Mapping[str, Hashable]: ...

    def describe(self) -> Blueprint: ...

    def apply(self, edits: Sequence[Edit], *, trusted: bool = True) -> Applied[Any]:
        """Carry out edits: all of them, or none if one is wrong. Raises RequestError that says what is wrong."""
        ...

    def edited_copy(self, contents: Contents) -> Editable:
        """Return the model of other contents of the same file, opened as this one and with the same edits."""
        ...

    def plan(
        self,
        out: Path,
        kind: str,
        *,
        bare: bool = False,
        compact: bool = False,
        traced: Traced | None = None,
        with_record: bool = True,
    ) -> Plan:
        """What to write, in a format of `writing`. `traced` is a forward pass of the model as it is, for its record."""
        ...

    def overflow_notes(self) -> list[str]:
        """Which values a narrower dtype cannot hold, known once they have been written."""
        ...

    def watches(self) -> Sequence[Watch]:
        """What records such values, in the same order in each process that has the same model."""
        ...

    def random_value_notes(self) -> list[str]:
        """Which values are in no file and were randomly initialised."""
        ...


def open_editable(source: Source, *, values: bool = False) -> Editable:
    """Open a model for edits. No value is read; with `values`, those of a model on the Hub are downloaded.

    Raises RequestError, AnswerNoError (a checkpoint that does not fit), UnsafeError, FileFormatError.
    """
    opened: Editable | None = opened_keys(source)
    if opened is None and values and (downloaded := resolve.downloaded(source)) != source:
        source = downloaded
        opened = opened_keys(source)  # what was on the Hub may be quantized
    if opened is None:
        resolve.require_buildable(source)  # before torch is imported
        from modelcli.live import opening

        opened = opening.open_live(source)
    opened.sources = replace(opened.sources, values=values)
    return opened


def opened_keys(source: Source) -> OpenStateDict | None:
    """A state-dict model that is open for edits; None where an architecture is known."""
    if not _is_file_alone(source):
        return None
    from modelcli.commands import state_dict_models

    return state_dict_models.opened(source)


def _is_file_alone(source: Source) -> bool:
    """Whether a source is a checkpoint whose keys alone are edited: it has no architecture, or it is not wanted."""
    if (source.arch is not None and not source.bare_keys) or source.weights not in (None, "none"):
        return False
    return isinstance(resolve.reference_of(source), CheckpointFile)

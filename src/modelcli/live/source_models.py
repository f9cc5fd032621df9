"""Open the other models that edits name. Files of tensors need no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcli import model_parts, resolve
from modelcli.checkpoints.reading_to_edit import read_to_edit
from modelcli.checkpoints.state_dict_model import model_of
from modelcli.edits.source_models import SourceModel
from modelcli.errors import RequestError
from modelcli.language.references import CheckpointFile, Source
from modelcli.model.state_dict import StateDictTensor

if TYPE_CHECKING:
    from modelcli.live.opening import Live


@dataclass(frozen=True)
class SourceModels:
    """Opens other models: see `edits.source_models.OpensSources`.

    Attributes:
        open_live: opens a model whose architecture is known: `live.opening.open_live`.
        trust: whether code that a record or a folder names may run, as for the model that is edited.
        tensors_only: whether to drop objects of foreign classes from files.
        values: whether values will be read, so that those of a model on the Hub are downloaded.
    """

    open_live: Callable[[Source], Live]
    trust: bool = False
    tensors_only: bool = False
    values: bool = True

    def open(self, text: str, *, weights: str | None, key: str | None, seed: int) -> SourceModel:
        """Open a model without reading its values. A checkpoint gives the tensors of its keys: no code of it runs."""
        name, part = model_parts.split(text)
        source = Source(name, weights, key=key, seed=seed, trust=self.trust, tensors_only=self.tensors_only)
        reference = resolve.reference_of(source)
        if isinstance(reference, CheckpointFile):
            return _file(source, reference, part)
        source = resolve.downloaded(source) if self.values else source
        resolve.require_buildable(source)
        live = self.open_live(source)
        from modelcli.live.surgery.state_dicts import new_module
        from modelcli.model.state_dict import assembled

        model = assembled(new_module(live.module, 0).parts)
        metadata = getattr(live.module.state_dict(), "_metadata", {})
        return SourceModel(source, part, model, metadata, (*live.notes, *live.random_value_notes()), live)

    def have_same_bytes(self, one: tuple[str, StateDictTensor], two: tuple[str, StateDictTensor]) -> bool:
        """Whether two tensors of other models, each with its name, have the same bytes, which are read in pieces."""
        from modelcli.values import equal_tensors

        return equal_tensors.have_same_bytes(one, two)


def _file(source: Source, reference: CheckpointFile, part: str) -> SourceModel:
    if source.weights is not None:
        raise RequestError(
            f"--source-weights {source.weights} and the checkpoint {reference} both say where the values come from",
            "leave one of them out",
        )
    notes: list[str] = []
    contents = read_to_edit(reference.path, source, notes)
    return SourceModel(source, part, model_of(contents), contents.metadata, (*notes, *contents.notes), contents)

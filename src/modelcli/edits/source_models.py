"""Other models whose tensors an edit takes: what an edit gets of them, and who opens them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from modelcli.language.references import Source
from modelcli.model.state_dict import StateDictModel, StateDictTensor


@dataclass(frozen=True)
class SourceModel:
    """Another model, open to take tensors from. None of its values has been read.

    Attributes:
        source: its reference without the part, and how it was opened.
        part: the selector of the part that was named behind the reference; empty for the whole model.
        model: all its tensors by their keys, with the sources of their bytes.
        metadata: the `_metadata` of its state dict, by path.
        notes: what there was to say when it was opened.
        opened: what a script needs to write how it is opened: the contents of a file, or a live model.
    """

    source: Source
    part: str
    model: StateDictModel
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]
    opened: Any

    @property
    def reference(self) -> str:
        """The reference without the part."""
        return self.source.model


class OpensSources(Protocol):
    """Opens the other models that edits name."""

    def open(self, text: str, *, weights: str | None, key: str | None, seed: int) -> SourceModel:
        """Open a model without reading its values.

        Args:
            text: `SOURCE` or `SOURCE:PATH`; relative paths start at the current folder.
            weights: where the values of a builder come from, as `--weights` says it for the model.
            key: the state dict inside a training checkpoint; None finds the usual ones.
            seed: the seed of values that are in no file.

        Raises RequestError, UnsafeError, FileFormatError, SystemFailureError.
        """
        ...

    def have_same_bytes(self, one: tuple[str, StateDictTensor], two: tuple[str, StateDictTensor]) -> bool:
        """Whether two tensors of other models, each with its name, have the same bytes, which are read in pieces."""
        ...

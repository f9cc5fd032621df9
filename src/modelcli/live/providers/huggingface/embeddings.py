"""The embedding of the tokens of a model of transformers, and the layer that gives a value for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The embedding of the tokens; None for a model without one."""
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # what models without tokens say
        return None
    return found if isinstance(found, nn.Embedding) else None


def output_embedding(model: PreTrainedModel) -> nn.Module | None:
    """The layer with an output for each token; None for a model without one."""
    try:
        found: nn.Module | None = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found

"""The embedding of the tokens of a model of transformers, and the layer that gives a value for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: What a pair of a text and an image model calls the text model.
_TEXT_MODEL = "text_model"


def input_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The embedding of the tokens; None for a model without one."""
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # what models without tokens say
        return None
    return found if isinstance(found, nn.Embedding) else None


def with_tokens(model: PreTrainedModel) -> tuple[str, nn.Embedding] | None:
    """The path of the part whose vocabulary transformers resizes, and its embedding; None for a model without tokens.

    The path is empty for the model itself. Of some pairs, such as CLIP, it is that of the text model.
    """
    for path, part in (("", model), (_TEXT_MODEL, getattr(model, _TEXT_MODEL, None))):
        if part is not None and (embedding := input_embedding(part)) is not None:
            return path, embedding
    return None


def output_embedding(model: PreTrainedModel) -> nn.Module | None:
    """The layer with an output for each token; None for a model without one."""
    try:
        found: nn.Module | None = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found

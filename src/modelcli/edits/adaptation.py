"""What `adapt` is asked for, and the edits that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelcli.edits.base import Edit
    from modelcli.language.stated_inputs import StatedInputs


@dataclass(frozen=True)
class Adaptation:
    """The wanted sizes; None for those that stay.

    Attributes:
        classes: the outputs of the classifier.
        in_channels: the channels of the images.
        image_size: their height and width.
        vocab_size: the number of tokens.
    """

    classes: int | None = None
    in_channels: int | None = None
    image_size: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class AdaptationPlan:
    """The edits that an adaptation stands for.

    Attributes:
        edits: the edits, in order.
        notes: what needs no edit, and why.
        inputs: the input to state for the adapted model; None if it takes the same one, or an edit says it.
    """

    edits: tuple[Edit, ...]
    notes: tuple[str, ...] = ()
    inputs: StatedInputs | None = None

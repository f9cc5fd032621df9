"""One edit of a script: what the statements for it are made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from modelcli.live.script.source_text import SourceText
from modelcli.model.state_dict import StateDictModel


@dataclass(frozen=True)
class Step:
    """What a handler may need to write an edit as statements.

    Attributes:
        script: the script so far: what the statements import and define goes in there.
        before: the model before the edit.
        after: the model after it.
        seed: that of the values that the edit draws; None where the generator is set already, or nobody needs them.
    """

    script: SourceText
    before: nn.Module
    after: nn.Module
    seed: int | None

    def seeded(self) -> list[str]:
        """The statement that sets the generator, where there is a seed."""
        return [] if self.seed is None else [f"torch.manual_seed({self.seed})"]


@dataclass(frozen=True)
class StateDictStep:
    """The same for an edit of a state-dict model."""

    script: SourceText
    before: StateDictModel
    after: StateDictModel
    seed: int | None

    def seeded(self) -> list[str]:
        """The statement that sets the generator, where there is a seed."""
        return [] if self.seed is None else [f"torch.manual_seed({self.seed})"]

    def new(self, path: str) -> nn.Module:
        """The module that the edit has put at a path."""
        found: nn.Module = self.after.modules[path].made
        return found

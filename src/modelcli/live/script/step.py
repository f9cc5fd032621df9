"""What the handler of an edit needs to write it as statements of a script."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from modelcli.edits.source_models import OpensSources
from modelcli.live.script.source_text import SourceText
from modelcli.model.state_dict import StateDictModel


@dataclass(frozen=True)
class Step:
    """An edit of a live model.

    Attributes:
        script: the script so far; imports and helpers are added to it.
        before: the model before the edit.
        after: the model after the edit.
        seed: the seed of the random values that the edit draws; None if the script need not seed the generator.
        sources: opens the other models that the edit names.
    """

    script: SourceText
    before: nn.Module
    after: nn.Module
    seed: int | None
    sources: OpensSources | None = None

    def seed_statements(self) -> list[str]:
        """Return the statement that seeds torch's generator; none without a seed."""
        return [] if self.seed is None else [f"torch.manual_seed({self.seed})"]


@dataclass(frozen=True)
class StateDictStep:
    """An edit of a state-dict model. The attributes are those of `Step`."""

    script: SourceText
    before: StateDictModel
    after: StateDictModel
    seed: int | None
    sources: OpensSources | None = None

    def seed_statements(self) -> list[str]:
        """Return the statement that seeds torch's generator; none without a seed."""
        return [] if self.seed is None else [f"torch.manual_seed({self.seed})"]

    def new(self, path: str) -> nn.Module:
        """Return the new module that the edit puts at a path."""
        found: nn.Module = self.after.modules[path].made
        return found

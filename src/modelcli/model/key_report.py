"""How the keys of a state dict fit a model, as plain data, and in words."""

from __future__ import annotations

from dataclasses import dataclass

from modelcli.errors import AnswerNoError
from modelcli.model.state_dict_match import Mismatch
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.wording import listed


@dataclass(frozen=True)
class KeyReport:
    """How the keys of a state dict fit a model.

    Attributes:
        matched: the number of keys that fit.
        missing: the keys that only the model has.
        unexpected: the keys that only the state dict has.
        mismatched: the tensors with another shape.
        unwrapping: the change of the state dict's keys that removes names of wrappers.
        overruled: the names of tied tensors that have different values in the state dict, each with the name whose
            values both have now.
    """

    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    unwrapping: Unwrapping = Unwrapping()
    overruled: tuple[tuple[str, str], ...] = ()

    @property
    def is_strict(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def differences(self, found: str, expected: str) -> list[str]:
        """Return what does not fit, as parts of a sentence.

        Args:
            found: where the keys come from: `in the file`.
            expected: what they should fit: `in the architecture`.
        """
        parts = [f"{m.name} is {list(m.found)} {found} and {list(m.expected)} {expected}" for m in self.mismatched[:3]]
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{word}: {listed(names, 3)}")
        return parts


class KeysDoNotMatchError(AnswerNoError):
    """The keys of another model do not match those of the part of a model that gets its values.

    Attributes:
        report: how they match.
        source: the other model: `dino.pth:backbone`.
        path: the path of the module that gets the values.
    """

    def __init__(self, message: str, hint: str | None, report: KeyReport, source: str, path: str) -> None:
        super().__init__(message, hint)
        self.report, self.source, self.path = report, source, path

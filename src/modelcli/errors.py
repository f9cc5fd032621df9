"""The errors of modelcli, each with its exit code. The core raises them; only `cli` prints them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

_REPLACE_DAMAGED = "copy or download it again; if that does not help, save it again with the program that wrote it"


class ModelcliError(Exception):
    """An error with a message and a hint for a person, and an exit code for a script.

    Attributes:
        kind: the name of the error class in JSON.
        message: what was wrong, with the value that was wrong.
        hint: what to do next, or None.
        notes: the notes collected before the error was raised; they may explain it.
    """

    exit_code = 2
    kind = "request"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class AnswerNoError(ModelcliError):
    """The command ran and its answer is no, such as a strict load with keys that do not match."""

    exit_code = 1
    kind = "no"


class RequestError(ModelcliError):
    """The request is wrong: an option, a reference, a selector, an expression or a shape."""


class UnsafeError(ModelcliError):
    """modelcli refuses the request because it would run code that came with a file."""

    exit_code = 3
    kind = "unsafe"


class FileFormatError(ModelcliError):
    """The file is corrupt, or has a format that modelcli does not know."""

    exit_code = 4
    kind = "format"

    @classmethod
    def damaged(cls, where: str, what: str) -> Self:
        """Return the error for a damaged file.

        Args:
            where: the file, and the part of it: `best.pth: archive/data.pkl`.
            what: what is wrong there.
        """
        return cls(f"{where} is damaged: {what}", _REPLACE_DAMAGED)


class SystemFailureError(ModelcliError):
    """The system failed: it has no space, permission, memory or network."""

    exit_code = 5
    kind = "system"


def closest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return the `count` candidates most similar to `word`, best first. Case is ignored."""
    import difflib

    pool = list(candidates)
    folded: dict[str, str] = {}
    for name in pool:
        folded.setdefault(name.lower(), name)
    found = difflib.get_close_matches(word.lower(), folded, n=count, cutoff=0.6)
    return [folded[name] for name in found]


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """Return `did you mean alexnet?`, or None if no candidate other than `word` itself is similar."""
    names = closest(word, (name for name in candidates if name != word))
    if not names:
        return None
    return f"did you mean {' or '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)}?"

"""What can go wrong, each with its exit code. The core raises these; `cli` alone turns them into words on a screen."""

from __future__ import annotations

from collections.abc import Iterable


class ModelcliError(Exception):
    """An error with a message for a person, a hint at what to do next, and an exit code for a script.

    `kind` names the class of error in JSON; `message` says what was wrong, with the value; `hint`, where there is
    one, says what to do next. `notes` are what was noted on the way to it, and may be where it comes from.
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
    """The question was understood and the answer is no: a strict load that does not match."""

    exit_code = 1
    kind = "no"


class RequestError(ModelcliError):
    """The request is wrong: usage, reference, selector, expression, shapes."""


class UnsafeError(ModelcliError):
    """Refused, because it would run code that came with a file."""

    exit_code = 3
    kind = "unsafe"


class FileFormatError(ModelcliError):
    """The file is corrupt, or of no kind that is known here."""

    exit_code = 4
    kind = "format"


class SystemFailureError(ModelcliError):
    """The system failed: no space, no permission, no memory, no network."""

    exit_code = 5
    kind = "system"


def closest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates most like `word`, best first; case is ignored before it is counted."""
    import difflib

    pool = list(candidates)
    folded: dict[str, str] = {}
    for name in pool:
        folded.setdefault(name.lower(), name)
    found = difflib.get_close_matches(word.lower(), folded, n=count, cutoff=0.6)
    return [folded[name] for name in found]


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """`did you mean alexnet?`, or None where nothing comes near. The word itself is no answer to it."""
    names = closest(word, (name for name in candidates if name != word))
    if not names:
        return None
    return f"did you mean {' or '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)}?"

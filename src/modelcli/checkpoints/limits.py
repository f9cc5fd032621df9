"""Limits on what a file may contain. Each can be set by an environment variable, which the error message names."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelcli.errors import FileFormatError, RequestError, UnsafeError

#: The bytes that a file needs to describe one tensor or module, besides its name; `Budget`s use this number.
ENTRY = 64


@dataclass(frozen=True)
class Limit:
    """A limit: its environment variable, its default, and the unit of what it counts."""

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The current limit. Raises RequestError if the variable is not a number."""
        return _number(self.variable, os.environ.get(self.variable), self.default)

    def check(self, found: int, what: str) -> None:
        """Raise FileFormatError if `found` exceeds the limit. `what` names the file and its part."""
        if found > self.value:
            raise self.exceeded(what, f"{found:,} {self.unit}")

    @property
    def hint(self) -> str:
        """How to raise the limit."""
        return f"if you trust the file, set the environment variable {self.variable} to a larger number"

    def exceeded(self, what: str, amount: str) -> FileFormatError:
        """Return the error: `best.pth: data.pkl has 70,000,000 bytes; the limit is 67,108,864`."""
        return FileFormatError(
            f"{what} has {amount}; the limit is {self.value:,}",
            self.hint,
        )


@functools.lru_cache
def _number(variable: str, text: str | None, default: int) -> int:
    if not text:
        return default
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 0 < number < 2**63:
        raise RequestError(f"${variable} is {text!r}, but must be a whole number above 0", f"the default is {default}")
    return number


PICKLE_BYTES = Limit("MODELCLI_MAX_PICKLE_BYTES", 64 * 1024 * 1024, "bytes")
#: For a pickle that torch.save did not write. It contains its tensors and is read as a whole.
WHOLE_PICKLE_BYTES = Limit("MODELCLI_MAX_WHOLE_PICKLE_BYTES", 4 * 1024**3, "bytes")
OPCODES = Limit("MODELCLI_MAX_OPCODES", 20_000_000, "opcodes")
#: For the values of a pickle, and for the modules and tensors of a pickled module, where shared ones count each time.
NODES = Limit("MODELCLI_MAX_NODES", 10_000_000, "values")
NESTING = Limit("MODELCLI_MAX_NESTING", 1_000, "levels")
NAME_BYTES = Limit("MODELCLI_MAX_NAME_BYTES", 4 * 1024, "bytes")
ZIP_ENTRIES = Limit("MODELCLI_MAX_ZIP_ENTRIES", 1_000_000, "entries")
#: Some of torch's operations support no more than 64.
DIMENSIONS = Limit("MODELCLI_MAX_DIMENSIONS", 64, "dimensions")
#: What a `Budget` allows in addition to the size of its file.
EXPANSION = Limit("MODELCLI_MAX_EXPANSION", 2 * 1024 * 1024, "bytes")
#: The modules that a constructor call of a known library may make, in a record or on the command line.
MODULES = Limit("MODELCLI_MAX_MODULES", 20_000, "modules")
#: The limit of the safetensors library.
HEADER_BYTES = Limit("MODELCLI_MAX_HEADER_BYTES", 100_000_000, "bytes")
INDEX_BYTES = Limit("MODELCLI_MAX_INDEX_BYTES", 64 * 1024 * 1024, "bytes")
ALL = (
    *(PICKLE_BYTES, WHOLE_PICKLE_BYTES, OPCODES, NODES, NESTING, NAME_BYTES, DIMENSIONS, EXPANSION),
    *(ZIP_ENTRIES, HEADER_BYTES, INDEX_BYTES, MODULES),
)


def too_many_modules(what: str, why: str) -> UnsafeError:
    """The error for a configuration that asks for more than `MODULES`; `why` is the end of its sentence."""
    return UnsafeError(
        f"the configuration of {what} {why}",
        f"mend its config.json; if it is right, set {MODULES.variable} to more than {MODULES.value:,}",
    )


class Budget:
    """Limits the work on a file in proportion to the file's size.

    A small file can describe a huge model by using one value a million times. Code that makes or visits a value for
    each of its uses charges the budget with the bytes that writing the value there would take. A file that contains
    every value once never exceeds its budget.
    """

    def __init__(self, what: str, nbytes: int, times: int = 1) -> None:
        """Start a budget.

        Args:
            what: the file and its part, for the error message.
            nbytes: the size of the file or part.
            times: the number of bytes that may be spent for each byte of the file.
        """
        self.what = what
        self.times = times
        self.nbytes = 0
        self.left = EXPANSION.value
        self.earn(nbytes)

    def earn(self, nbytes: int) -> None:
        """Add the size of another part of the file, before anything that it describes is charged."""
        self.nbytes += nbytes
        self.left += self.times * nbytes

    def spend(self, nbytes: int, name: str | None = None) -> None:
        """Charge for a value, called `name`, before it is made. Raises FileFormatError if the budget is used up."""
        self.left -= nbytes
        if self.left < 0:
            at = "" if name is None else f" (reached at {name})"
            raise FileFormatError(
                f"{self.what} has {self.nbytes:,} bytes, but describes a model that is too large for that size, "
                f"because it uses the same values again and again{at}; the limit is {EXPANSION.value:,} bytes more",
                EXPANSION.hint,
            )


#: The modules that a name may add. Adapters add three: a layer with one tensor in its own module.
_MODULES_OF_A_NAME = 4


def pay_for_modules(names: Collection[str], what: str) -> Callable[[int], None]:
    """Return a function that charges for a module, given the length of its path, before it is made of one of the names.

    (A name of 4,000 characters can describe 2,000 modules.) The function raises FileFormatError that starts with
    `what` if the modules are far larger than the names.
    """
    budget = Budget(what, size_of_names(names), _MODULES_OF_A_NAME)
    return lambda length: budget.spend(ENTRY + length)


def size_of_names(names: Collection[str]) -> int:
    """Return the size of names in a file, for a budget."""
    return sum(map(len, names)) + ENTRY * len(names)


def check_name(name: str, what: str) -> None:
    """Raise FileFormatError if the name of a tensor, record or class is too long or has too many components."""
    shown = f"{what}: the name {name[:40]!r}..."
    NAME_BYTES.check(len(name.encode("utf-8", "surrogatepass")), shown)
    NESTING.check(name.count("."), shown)


def check_names(names: Collection[str], what: str) -> None:
    """Raise FileFormatError if any of the names is too long or has too many components. Short names are not checked."""
    longest = min(NAME_BYTES.value // 4, NESTING.value)  # a character takes up to four bytes
    if max(map(len, names), default=0) <= longest:
        return
    for name in names:
        if len(name) > longest:
            check_name(name, what)


@contextmanager
def room_for_nesting(frames: int = 4) -> Iterator[None]:
    """Let Python recurse as deep as the nesting limit allows, with `frames` stack frames for each level."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, before + frames * NESTING.value))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)

"""How much a file may ask for before it is refused. Each limit can be set by a variable, which the refusal names."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelcli.errors import FileFormatError, RequestError

#: What a file takes to say where one tensor or one module is, besides its name: `Budget`s count with it.
ENTRY = 64


@dataclass(frozen=True)
class Limit:
    """A number that nothing a file says may exceed; `variable` is where the user sets another."""

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The number in force. Raises RequestError where the variable holds none."""
        return _number(self.variable, os.environ.get(self.variable), self.default)

    def check(self, found: int, what: str) -> None:
        """Raise FileFormatError where `found` is more than the limit; `what` names the file and what in it."""
        if found > self.value:
            raise self.exceeded(what, f"{found:,} {self.unit}")

    def exceeded(self, what: str, amount: str) -> FileFormatError:
        """The refusal: `best.pth: data.pkl has 70,000,000 bytes; the limit is 67,108,864`."""
        return FileFormatError(
            f"{what} has {amount}; the limit is {self.value:,}",
            f"if you trust where it comes from, set {self.variable} to more",
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
        raise RequestError(
            f"${variable} is {text!r}, and has to be a whole number above 0", f"the default is {default}"
        )
    return number


PICKLE_BYTES = Limit("MODELCLI_MAX_PICKLE_BYTES", 64 * 1024 * 1024, "bytes")
#: Of a pickle that torch.save did not write: its tensors lie in it, and it is read whole.
WHOLE_PICKLE_BYTES = Limit("MODELCLI_MAX_WHOLE_PICKLE_BYTES", 4 * 1024**3, "bytes")
OPCODES = Limit("MODELCLI_MAX_OPCODES", 20_000_000, "opcodes")
#: Values of a pickle; modules and tensors of a module pickled whole, where shared ones have a name at each place.
NODES = Limit("MODELCLI_MAX_NODES", 10_000_000, "values")
NESTING = Limit("MODELCLI_MAX_NESTING", 1_000, "levels")
NAME_BYTES = Limit("MODELCLI_MAX_NAME_BYTES", 4 * 1024, "bytes")
ZIP_ENTRIES = Limit("MODELCLI_MAX_ZIP_ENTRIES", 1_000_000, "entries")
#: Some of torch's operations end at 64, and no model comes near.
DIMENSIONS = Limit("MODELCLI_MAX_DIMENSIONS", 64, "dimensions")
#: What a `Budget` has beyond the size of its file.
EXPANSION = Limit("MODELCLI_MAX_EXPANSION", 2 * 1024 * 1024, "bytes")
#: Modules that a constructor call of a known library may make, in a record or as it is typed.
MODULES = Limit("MODELCLI_MAX_MODULES", 20_000, "modules")
#: As safetensors' own reader has it.
HEADER_BYTES = Limit("MODELCLI_MAX_HEADER_BYTES", 100_000_000, "bytes")
INDEX_BYTES = Limit("MODELCLI_MAX_INDEX_BYTES", 64 * 1024 * 1024, "bytes")
ALL = (
    *(PICKLE_BYTES, WHOLE_PICKLE_BYTES, OPCODES, NODES, NESTING, NAME_BYTES, DIMENSIONS, EXPANSION),
    *(ZIP_ENTRIES, HEADER_BYTES, INDEX_BYTES, MODULES),
)


class Budget:
    """What may be made of a file: no more than a file of its size could spell out, and a little.

    A file of a few bytes can name one value at a million places. Whoever makes or looks through a value once for each
    place that it has spends here what it would take to write it there: what says everything once has enough.
    """

    def __init__(self, what: str, nbytes: int, times: int = 1) -> None:
        """`times` is how much may come of each byte."""
        self.what = what
        self.times = times
        self.earned = 0
        self.left = EXPANSION.value
        self.earn(nbytes)

    def earn(self, nbytes: int) -> None:
        """Add the size of another part of the file, before what it says is paid for."""
        self.earned += nbytes
        self.left += self.times * nbytes

    def spend(self, nbytes: int, name: str | None = None) -> None:
        """Pay for what is about to be made, of what has the `name`. Raises FileFormatError where it is too much."""
        self.left -= nbytes
        if self.left < 0:
            counted = "counted at each place" if name is None else f"counted at each place up to {name}"
            more = f"{self.earned:,} bytes and, all that it shares {counted}, over {EXPANSION.value:,} more"
            raise EXPANSION.exceeded(self.what, more)


def check_name(name: str, what: str) -> None:
    """Raise FileFormatError for a name of a tensor, record or class that is too long or too deep to be one."""
    shown = f"{what}: the name {name[:40]!r}..."
    NAME_BYTES.check(len(name.encode("utf-8", "surrogatepass")), shown)
    NESTING.check(name.count("."), shown)


def check_names(names: Iterable[str], what: str) -> None:
    """Raise FileFormatError where one of many names is too long or too deep; those that cannot be are passed over."""
    longest = min(NAME_BYTES.value // 4, NESTING.value)  # a character takes up to four bytes
    for name in names:
        if len(name) > longest:
            check_name(name, what)


@contextmanager
def room_for_nesting(frames: int = 4) -> Iterator[None]:
    """Let Python recurse into values as deep as the limit on nesting allows, with so many frames for each level."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, before + frames * NESTING.value))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)

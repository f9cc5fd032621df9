"""JSON from a file, read strictly: UTF-8, no name twice in one object, and no more values than its size warrants."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import Any

from modelcli.checkpoints import limits

#: What a list or an object takes in the header of a safetensors file, which has little else.
_CONTAINER = 16


def loads(data: bytes, what: str) -> Any:
    """The value; `what` names it. Raises ValueError or RecursionError for what is no JSON, not UTF-8, or has a name
    twice, and FileFormatError where it is made of brackets and little else."""
    text = data.decode()
    pay_for(text, limits.Budget(what, len(text)))
    if "\\" not in text:  # nothing is escaped, so what is counted in the text is there
        value = json.loads(text, parse_constant=_no_number)
        if _has_no_duplicates(value, text):
            return value
    value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_number)
    if "\\ud" in text or "\\uD" in text:  # half of a pair is no character: other readers refuse it
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _has_no_duplicates(value: Any, text: str) -> bool:
    """Whether it is certain that no object has a name twice; False where only a closer look could tell.

    That is so where all objects of the text are found close to the top, and have as many names as the text has colons;
    braces and colons in texts make it more. To look at the pairs of every object takes longer than to read a header.
    """
    found = [value] if type(value) is dict else []
    found += [below for above in found for below in above.values() if type(below) is dict]
    return len(found) == text.count("{") and sum(map(len, found)) == text.count(":")


def pay_for(text: str, budget: limits.Budget) -> None:
    """Pay for the lists and objects of a text before they are made: one of two characters takes 30 times as much."""
    budget.spend(_CONTAINER * (text.count("[") + text.count("{")))


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{reprlib.repr(twice)} stands in it twice")
    return found

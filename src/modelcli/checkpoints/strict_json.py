"""Read JSON from a file strictly: UTF-8, no name twice in an object, and a number of values in line with its size."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import Any

from modelcli.checkpoints import limits

#: The bytes that a list or an object takes, with its content, in the header of a safetensors file.
_CONTAINER = 16


def loads(data: bytes, what: str) -> Any:
    """Parse JSON. `what` names it in error messages.

    Raises:
        ValueError, RecursionError: the data is not JSON or not UTF-8, or an object has a name twice.
        FileFormatError: the data consists of little else than brackets, which would take much memory.
    """
    text = data.decode()
    pay_for(text, limits.Budget(what, len(text)))
    if "\\" not in text:  # nothing is escaped, so the characters can be counted in the text
        value = json.loads(text, parse_constant=_no_number)
        if _has_no_duplicates(value, text):
            return value
    value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_number)
    if "\\ud" in text or "\\uD" in text:  # other readers refuse half of a surrogate pair
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _has_no_duplicates(value: Any, text: str) -> bool:
    """Whether it is certain that no object has a name twice. False means that every object has to be checked.

    It is certain if all objects of the text are near the top of `value`, and have as many names together as the text
    has colons. (Braces and colons inside strings only increase the counts.) Checking every object would take longer
    than parsing the header of a safetensors file.
    """
    objects = [value] if type(value) is dict else []
    objects += [child for parent in objects for child in parent.values() if type(child) is dict]
    return len(objects) == text.count("{") and sum(map(len, objects)) == text.count(":")


def pay_for(text: str, budget: limits.Budget) -> None:
    """Charge a budget for the lists and objects of a text, before `[]` takes 30 times its size in memory."""
    budget.spend(_CONTAINER * (text.count("[") + text.count("{")))


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object in it has the name {reprlib.repr(twice)} twice")
    return found

"""JSON from a file, read strictly: UTF-8, and no name twice in one object."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import Any


def loads(data: bytes) -> Any:
    """The value. Raises ValueError or RecursionError for what is no JSON, not UTF-8, or has a name twice."""
    return json.loads(data.decode(), object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{reprlib.repr(twice)} stands in it twice")
    return found

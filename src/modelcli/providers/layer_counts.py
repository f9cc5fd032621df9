"""How many layers a configuration of transformers or timm asks for, from its numbers, before anything is built.

A `config.json` of a hundred bytes can ask for a million layers. To build them until a bound is met takes seconds, and
so does importing what builds them, so the counts are added up first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

#: The names of numbers of things that are made one by one: `num_hidden_layers`, `depth`, `num_encoder_blocks`.
_COUNT = re.compile(r"(?:layers?|depths?|blocks?|stages?|quantizers|codebooks|hidden_groups|group_num|feature_levels)$")
#: The same of lists with a number for each stage. Other lists, such as `moe_layers`, have the places of layers.
_COUNTS = re.compile(
    r"(?:depths|^layers|^(?:num|n)_\w*(?:layers|blocks)|numb?_(?:of_)?(?:layers|blocks)|^blocks_per_stage)$"
)
#: What each layer takes at least, in modules. So a model whose layers are smaller may have fewer of them, too.
_MODULES_OF_A_LAYER = 20
#: Longer lists have a value for each layer or stage, where they are not words, labels, tokens or languages.
_LONG = 500
_WORDS = re.compile(r"(?:labels?|tokens?|words?|names?|lang(?:uage)?s?|classes|ids?)$")
#: Entries whose keys and values are anybody's words.
_LABELS = frozenset({"id2label", "label2id"})


def excess(document: Mapping[str, Any], modules: int) -> str | None:
    """Why a configuration asks for more layers than any model has, as the end of a sentence; None where it does not.

    Args:
        document: the configuration as JSON values, with those of its parts, such as `text_config`.
        modules: how many modules a model may have.
    """
    most = modules // _MODULES_OF_A_LAYER
    counts = dict(_counts(document))
    total = sum(counts.values())
    if total <= most:
        return None
    place = max(counts, key=counts.__getitem__)
    reason = f"{place} is {counts[place]:,}" if counts[place] > total // 2 else f"its counts add up to {total:,}"
    return f"asks for too many layers: {reason}, and at most {most:,} are built"


def _counts(document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Each count of a configuration and of its parts, by its place: `text_config.num_hidden_layers`."""
    waiting: list[tuple[str, str, Any]] = [("", "", document)]
    while waiting:
        place, name, value = waiting.pop()
        if isinstance(value, Mapping):
            prefix = f"{place}." if place else ""
            waiting += [(f"{prefix}{key}", str(key), each) for key, each in value.items() if key not in _LABELS]
        elif isinstance(value, list | tuple):
            if not _WORDS.search(name):
                numbers = [abs(each) for each in value if _is_number(each)] if _COUNTS.search(name) else []
                yield place, max(len(value) if len(value) > _LONG else 0, sum(numbers))
            waiting += [(f"{place}.{at}", name, each) for at, each in enumerate(value) if isinstance(each, Mapping)]
        elif _is_number(value) and _COUNT.search(name):
            yield place, abs(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

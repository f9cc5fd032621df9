"""Which known models a state dict is like, by the names and shapes of its tensors: plain data, compared as it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcli.model.tensors import Shape, TensorInfo

if TYPE_CHECKING:
    from modelcli.model.wrapper_prefixes import Unwrapping

Shapes = Mapping[str, Shape]

#: What the cache keeps of the builders: the fingerprints alone, for a look at a file, and all names and shapes.
FINGERPRINTS, LISTING = "fingerprints", "tensors of builders"

#: BatchNorm's count of batches. Files from before torch 0.4.1 lack it, frozen ones too, and PyTorch loads both.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Mismatch:
    """A tensor of one shape in the model, and another in the file."""

    name: str
    expected: Shape
    found: Shape


@dataclass(frozen=True)
class Match:
    """How a file's tensors fit a model's: `matched` is the number of those that are in both, in one shape."""

    model: str
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()

    @property
    def distance(self) -> int:
        """How many tensors do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    @property
    def exact(self) -> bool:
        return not self.distance


def shapes_of(tensors: Iterable[TensorInfo]) -> dict[str, Shape]:
    """The names and shapes that are compared: of what is saved, but for BatchNorm's counts of batches."""
    return {
        tensor.name: tensor.shape
        for tensor in tensors
        if tensor.persistent and tensor.shape is not None and not tensor.name.endswith(_COUNTER)
    }


def unwrapped(shapes: Shapes) -> tuple[Shapes, Unwrapping]:
    """The shapes without what wrappers put into the names, and what that is. No known model has such names."""
    from modelcli.model import wrapper_prefixes

    found = wrapper_prefixes.known(shapes)
    if not found:
        return shapes, found
    return {found.key(name): shape for name, shape in shapes.items() if name not in found.dropped}, found


def fingerprint(shapes: Shapes) -> str:
    """The same text for the same names and shapes, in whatever order."""
    import hashlib  # as in cache

    text = json.dumps([[name, *shapes[name]] for name in sorted(shapes)], separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def compare(model: str, expected: Shapes, found: Shapes) -> Match:
    """How what was found fits what a model expects."""
    both = [name for name in expected if name in found]
    mismatched = tuple(Mismatch(name, expected[name], found[name]) for name in both if expected[name] != found[name])
    return Match(
        model,
        len(both) - len(mismatched),
        tuple(name for name in expected if name not in found),
        tuple(name for name in found if name not in expected),
        mismatched,
    )


def best(found: Shapes, models: Mapping[str, Shapes], most: int) -> list[Match]:
    """The models that fit exactly, all of them; if none does, at most so many that come near, the nearest first.

    Near is a model that has at least half of the file's tensors, and of whose own tensors the file has half.
    """
    matches = [compare(model, expected, found) for model, expected in models.items()]
    matches.sort(key=lambda match: (match.distance, _unusual(match.model), match.model))
    if exact := [match for match in matches if match.exact]:
        return exact
    near = (match for match in matches if 2 * match.matched >= max(len(found), len(models[match.model]), 1))
    return list(near)[:most]


def in_order(models: Iterable[str]) -> list[str]:
    """Models that fit alike, those first that are meant most often."""
    return sorted(models, key=lambda model: (_unusual(model), model))


def _unusual(model: str) -> tuple[bool, bool]:
    """What comes behind other models that fit as well: twins made to be quantized, and those that need arguments."""
    return model.startswith("quantized_"), "(" in model

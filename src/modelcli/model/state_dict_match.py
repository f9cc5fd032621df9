"""Find the known models whose state dict has the names and shapes of a given one. Works on plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcli.model.tensors import Shape, TensorInfo

if TYPE_CHECKING:
    from modelcli.model.wrapper_prefixes import Unwrapping

Shapes = Mapping[str, Shape]

#: The cache entries about builders: the fingerprints alone (enough for a note about a file), and all names and shapes.
FINGERPRINTS, LISTING = "fingerprints", "tensors of builders"

#: BatchNorm's count of batches. Files from before torch 0.4.1 and frozen norms lack it; PyTorch loads both.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose shape in the file (`found`) is not the model's (`expected`)."""

    name: str
    expected: Shape
    found: Shape


@dataclass(frozen=True)
class Match:
    """How the tensors of a file fit a model. `matched` counts the tensors that both have with the same shape."""

    model: str
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()

    @property
    def distance(self) -> int:
        """The number of tensors that do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    @property
    def exact(self) -> bool:
        return not self.distance

    @property
    def is_close(self) -> bool:
        """Whether at least half of the file's tensors and half of the model's own match."""
        both = self.matched + len(self.mismatched)
        return 2 * self.matched >= max(both + len(self.unexpected), both + len(self.missing), 1)


def shapes_of(tensors: Iterable[TensorInfo]) -> dict[str, Shape]:
    """Return the names and shapes to compare: those of persistent tensors, without BatchNorm's counts of batches."""
    return {
        tensor.name: tensor.shape
        for tensor in tensors
        if tensor.persistent and tensor.shape is not None and not tensor.name.endswith(_COUNTER)
    }


def unwrapped(shapes: Shapes) -> tuple[Shapes, Unwrapping]:
    """Remove from the names what wrappers added. Returns the new shapes and what was removed.

    No known model uses such names itself.
    """
    from modelcli.model import wrapper_prefixes

    found = wrapper_prefixes.known(shapes)
    if not found:
        return shapes, found
    return {found.key(name): shape for name, shape in shapes.items() if name not in found.dropped}, found


def fingerprint(shapes: Shapes) -> str:
    """Return a hash of names and shapes that does not depend on their order."""
    import hashlib  # as in cache

    text = json.dumps([[name, *shapes[name]] for name in sorted(shapes)], separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def compare(model: str, expected: Shapes, found: Shapes) -> Match:
    """Compare the shapes found in a file with those that `model` expects."""
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
    """Return all models that fit exactly; if there are none, the closest ones, at most `most`, best first.

    A model is close if at least half of the file's tensors and half of its own tensors match.
    """
    matches = [compare(model, expected, found) for model, expected in models.items()]
    matches.sort(key=lambda match: (match.distance, _unusual(match.model), match.model))
    if exact := [match for match in matches if match.exact]:
        return exact
    return [match for match in matches if match.is_close][:most]


def in_order(models: Iterable[str]) -> list[str]:
    """Sort models that fit equally well: those that people mean most often come first."""
    return sorted(models, key=lambda model: (_unusual(model), model))


def _unusual(model: str) -> tuple[bool, bool, bool]:
    """Sort key that puts quantizable variants, builders with arguments and models with a prefix last."""
    return model.startswith("quantized_"), "(" in model, ":" in model

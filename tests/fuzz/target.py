"""What a fuzzer is run on: a parser as a function of bytes, and how inputs for it are made."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fuzz.mutations import mutated


@dataclass(frozen=True)
class Target:
    """A parser: what is run on an input, good inputs, and the words that the format is made of.

    `grammar`, where there is one, makes every second input; `nasty` are inputs that are run once each, before the
    others. `one_in` says that so many times fewer inputs are run, since each takes so much longer. `forbidden` are the
    events of `sys.audit` that no input may bring about.
    """

    name: str
    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    words: Sequence[bytes]
    grammar: Callable[[random.Random], bytes] | None = None
    nasty: Sequence[bytes] = ()
    one_in: int = 1
    forbidden: frozenset[str] = frozenset()

    def made(self, draw: random.Random) -> bytes:
        """One input, of the grammar or a good one with changes."""
        if self.grammar is not None and draw.randrange(2):
            return self.grammar(draw)
        return mutated(self.seeds, self.words, draw)

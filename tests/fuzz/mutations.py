"""Mutate valid inputs with a seeded generator: flips, cuts, copies, extreme numbers, words of the format."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

#: The extreme numbers of some types.
EDGES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(seeds: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> bytes:
    """Return one of the seeds with one to six changes. `words` are byte strings that occur in such files."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(data):
                data[at] = draw.randrange(256)
            case 2:
                del data[at : at + draw.choice((1, 1, 2, 4, 16, 200))]
            case 3:
                data[at:at] = draw.randbytes(draw.choice((1, 1, 2, 4, 16)))
            case 4:
                start = draw.randrange(len(data) + 1)
                data[at:at] = data[start : start + draw.choice((1, 4, 16, 64, 300))]
            case 5:
                form = draw.choice(("<B", "<H", "<I", "<Q"))
                number = draw.choice(EDGES) % 256 ** struct.calcsize(form)
                data[at : at + struct.calcsize(form)] = struct.pack(form, number)
            case 6:
                data[at:at] = draw.choice(words)
            case 7:
                other = draw.choice(seeds)
                data[at:] = other[draw.randrange(len(other) + 1) :]
            case _:
                word = draw.choice(words)
                data[at : at + len(word)] = word
    return bytes(data)

"""One pass over the elements of tensors: in pieces, on several threads, with the results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import TypeVar

import numpy as np

from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.limits import Budget
from modelcli.values import reading
from modelcli.values.dtypes import Array
from modelcli.values.ordered_work import in_order
from modelcli.values.reading import Readers, nbytes_shown, pieces_of

_Result = TypeVar("_Result")
#: A tensor's name, its piece, and the same piece of the tensor it is compared with, where there is one.
_Piece = tuple[str, tuple[TensorEntry, ...]]

#: What a value counts as that is made a Python object and written, and one that NumPy works off: see `budget_of`.
SHOWN, COUNTED = 16, 4
#: A thread takes pieces of so many bytes together, or so many small ones.
_BATCH_BYTES, _BATCH_PIECES = 1 << 22, 512


def budget_of(tensors: Iterable[TensorEntry], what: str) -> Budget:
    """What may be made of the values of tensors: views can have far more elements than there are bytes in a file.

    A value that is shown counts as `SHOWN`, one of statistics as `COUNTED`.
    """
    nbytes = {id(entry.storage): entry.storage.nbytes for entry in tensors}
    return Budget(what, sum(nbytes.values()), times=SHOWN)


def each_piece(
    tensors: Mapping[str, tuple[TensorEntry, ...]], work: Callable[..., _Result], what: str
) -> Iterator[tuple[str, int, _Result]]:
    """What `work` makes of each piece of the tensors; their names and pieces come in order.

    Args:
        tensors: By a name, a tensor, or several of one shape whose pieces are looked at together.
        work: Called from several threads with the elements of each, then with the dtype of each; it may not keep
            or change the elements.
        what: What the tensors are called in a refusal.

    Returns:
        The name, the bytes of the piece's elements (of the first tensor), and the result.

    Raises:
        FileFormatError: Where views show far more elements than their storages have, and where a file has changed.
    """
    entries = [entry for several in tensors.values() for entry in several]
    with Readers(entries) as readers:

        def work_off(batch: list[_Piece]) -> list[tuple[str, int, _Result]]:
            done = []
            with np.errstate(all="ignore"):
                for name, pieces in batch:
                    elements: list[Array] = [readers.own(number).elements(piece) for number, piece in enumerate(pieces)]
                    result = work(*elements, *(piece.dtype for piece in pieces))
                    done.append((name, nbytes_shown(pieces[0]), result))
            return done

        for batch in in_order(work_off, _batches(tensors, budget_of(entries, what))):
            yield from batch


def _batches(tensors: Mapping[str, tuple[TensorEntry, ...]], budget: Budget) -> Iterator[list[_Piece]]:
    """The pieces of all tensors, so many together as are worth a thread's while."""
    batch: list[_Piece] = []
    nbytes = 0
    for name, entries in tensors.items():
        for number, pieces in enumerate(pieces_of(*map(reading.at_hand, entries))):
            # Besides its elements, a piece takes a while by itself: many may be made of few elements far apart.
            budget.spend(COUNTED * (prod(pieces[0].shape) + (reading.PIECE // 64 if number else 0)), name)
            batch.append((name, pieces))
            nbytes += nbytes_shown(pieces[0])
            if nbytes >= _BATCH_BYTES or len(batch) == _BATCH_PIECES:
                yield batch
                batch, nbytes = [], 0
    if batch:
        yield batch

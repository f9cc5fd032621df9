"""Make one pass over the elements of tensors in pieces, on several threads, with the results in order."""

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
#: The name of a tensor, and a piece of it, or the same piece of each of the tensors under that name.
_Piece = tuple[str, tuple[TensorEntry, ...]]

#: The cost of a value that becomes a Python object and is printed, and of one that NumPy processes: see `budget_of`.
PRINT_COST, PROCESS_COST = 16, 4
#: A thread gets a batch of pieces with about so many bytes, or with at most so many pieces.
_BATCH_BYTES, _BATCH_PIECES = 1 << 22, 512


def budget_of(tensors: Iterable[TensorEntry], what: str) -> Budget:
    """Return a budget for work on the values of tensors, because views can have far more elements than the file.

    Printing a value costs `PRINT_COST`, and statistics cost `PROCESS_COST` a value. `what` names the model in errors.
    """
    nbytes = {id(entry.storage): entry.storage.nbytes for entry in tensors}
    return Budget(what, sum(nbytes.values()), times=PRINT_COST)


def each_piece(
    tensors: Mapping[str, tuple[TensorEntry, ...]],
    work: Callable[..., _Result],
    what: str,
    given: Mapping[str, object] | None = None,
) -> Iterator[tuple[str, int, _Result]]:
    """Call `work` for each piece of the tensors, and yield the results in the order of names and pieces.

    Args:
        tensors: a tensor by its name, or several tensors of one shape whose pieces belong together.
        work: called from several threads with the elements of each tensor's piece, then the dtype of each. It may not
            keep or change the elements.
        what: the name of the model in error messages.
        given: a last argument for `work`, by the name of the tensor; None for none.

    Yields:
        The name, the bytes of the piece's elements (in the first tensor), and the result.

    Raises:
        FileFormatError: views show far more elements than their storages have, or a file has changed.
    """
    entries = [entry for group in tensors.values() for entry in group]
    with Readers(entries) as readers:

        def work_on(batch: list[_Piece]) -> list[tuple[str, int, _Result]]:
            done = []
            with np.errstate(all="ignore"):
                for name, pieces in batch:
                    elements: list[Array] = [readers.own(number).elements(piece) for number, piece in enumerate(pieces)]
                    more = () if given is None else (given[name],)
                    result = work(*elements, *(piece.dtype for piece in pieces), *more)
                    done.append((name, nbytes_shown(pieces[0]), result))
            return done

        for batch in in_order(work_on, _batches(tensors, budget_of(entries, what))):
            yield from batch


def _batches(tensors: Mapping[str, tuple[TensorEntry, ...]], budget: Budget) -> Iterator[list[_Piece]]:
    """Yield the pieces of all tensors in batches that are large enough for a thread."""
    batch: list[_Piece] = []
    nbytes = 0
    for name, entries in tensors.items():
        for number, pieces in enumerate(pieces_of(*map(reading.at_hand, entries))):
            # A piece also has a fixed cost: a tensor with a few elements far apart can have many pieces.
            budget.spend(PROCESS_COST * (prod(pieces[0].shape) + (reading.PIECE // 64 if number else 0)), name)
            batch.append((name, pieces))
            nbytes += nbytes_shown(pieces[0])
            if nbytes >= _BATCH_BYTES or len(batch) == _BATCH_PIECES:
                yield batch
                batch, nbytes = [], 0
    if batch:
        yield batch

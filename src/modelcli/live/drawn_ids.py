"""Draw token ids and other indices from the rows of the tables in which the model looks them up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from modelcli.live import trace
from modelcli.live.inputs import Arguments, Inputs
from modelcli.live.meta_models import seeded
from modelcli.wording import listed


def maker(module: nn.Module, inputs: Inputs, device: str) -> tuple[Callable[[], Arguments], tuple[str, ...]]:
    """Return a function that makes the arguments of a pass, with the same values at each call, and notes.

    An integer input is drawn, from seed 0, if the model looks up rows of a table with it: `torch.nn.Embedding`,
    `torch.nn.functional.embedding`, `table[ids]`, `index_select`. Elements that the inputs state keep their values. If
    the model does not run with what is drawn for an input, that one is zeros, as other integers are.

    Args:
        module: the model, with values on `device`.
        inputs: the inputs.
        device: where the arguments are made.
    """

    def plain() -> Arguments:
        return inputs.tensors(device)

    arguments = plain()
    if not any(_is_index(tensor) for tensor in arguments):
        return plain, ()
    rows = _rows(module, arguments, device)
    if not rows:
        return plain, ()

    def drawn(indices: Collection[int]) -> Arguments:
        made = plain()
        _fill(made, {index: rows[index] for index in indices}, inputs)
        return made

    def runs(indices: Collection[int]) -> bool:
        return trace.run(module, drawn(indices), device=device, judged=False).failure is None

    used = list(rows)
    if not runs(used):  # some may have to agree, as the corners of a box
        used = []
        for index in rows:
            used += [index] if runs([*used, index]) else []
    left = listed([_name(arguments, index) for index in rows if index not in used], 3)
    note = f"the model does not run with drawn indices for {left}, so the check looked at row 0 of their tables"
    return partial(drawn, used), () if len(used) == len(rows) else (note,)


def _is_index(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _rows(module: nn.Module, arguments: Arguments, device: str) -> dict[int, int]:
    """Return how many rows the tables have that each input indexes, by the position of the tensor in the arguments."""
    seen = _Lookups({tensor.untyped_storage()._cdata: index for index, tensor in enumerate(arguments)})
    trace.run(module, arguments, device=device, judged=False, modes=(seen,))
    return seen.rows


class _Lookups(TorchFunctionMode):
    """Records the number of rows of each table in which a tensor with one of these storages is looked up."""

    def __init__(self, inputs: Mapping[int, int]) -> None:
        super().__init__()
        self.inputs = inputs
        self.rows: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (found := _lookup(func, args, kwargs)) is not None:
            ids, rows = found
            index = self.inputs.get(ids.untyped_storage()._cdata)
            if index is not None and _is_index(ids):
                self.rows[index] = min(rows, self.rows.get(index, rows))
        return func(*args, **kwargs)


#: The functions that look up rows: the positions of the indices and of the table among their arguments.
_LOOKUPS: dict[Any, tuple[int, int]] = {
    functional.embedding: (0, 1),
    functional.embedding_bag: (0, 1),
    torch.embedding: (1, 0),
    torch.embedding_bag: (1, 0),
    torch.Tensor.__getitem__: (1, 0),
    torch.index_select: (2, 0),
    torch.Tensor.index_select: (2, 0),
}


def _lookup(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, int] | None:
    """Return the indices of a call that looks up rows, and the number of rows; None for any other call."""
    if func not in _LOOKUPS:
        return None
    at, of = _LOOKUPS[func]
    given = [*args, *kwargs.values()]  # torch names these arguments in the order in which it takes them
    if len(given) <= max(at, of):
        return None
    ids, table = given[at], given[of]
    axis = given[1] if at == 2 else 0
    if not isinstance(ids, torch.Tensor) or not isinstance(table, torch.Tensor) or not table.dim():
        return None
    return ids, int(table.shape[axis])


def _fill(made: Arguments, rows: Mapping[int, int], inputs: Inputs) -> None:
    """Draw the values of the tensors at these positions, except the first ones that the inputs state.

    A value that is stated, such as the token of an image, is not drawn: its number may have to agree with other inputs.
    """
    stated = {id(value): inputs.values.get(name, ()) for name, value in made.kwargs.items()}
    with seeded(0):
        for index, tensor in enumerate(made):
            if rows.get(index, 0) > 0:
                drawn = torch.randint(0, rows[index], tuple(tensor.shape), dtype=tensor.dtype)
                special = stated.get(id(tensor), ())
                drawn[torch.isin(drawn, torch.tensor(special, dtype=tensor.dtype))] = 0
                tensor.view(-1)[len(special) :] = drawn.view(-1)[len(special) :].to(tensor.device)


def _name(arguments: Arguments, index: int) -> str:
    """Return the name of the argument that contains the tensor at a position; its position if it has none."""
    wanted = list(arguments)[index]
    for name, value in arguments.kwargs.items():
        if any(tensor is wanted for tensor in Arguments((value,))):
            return name
    return f"input {index}"

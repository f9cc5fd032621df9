"""The known inputs of a model, and the arguments of `forward` made from them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from modelcli.errors import RequestError, did_you_mean
from modelcli.language import input_texts
from modelcli.language.input_texts import InputText
from modelcli.language.stated_inputs import StatedInputs
from modelcli.live import signatures
from modelcli.live.meta_models import seeded
from modelcli.wording import listed


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call of `forward`. Iterating yields its tensors, including those inside lists and dicts."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return tensors_in((self.args, self.kwargs))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value of nested lists, tuples and dicts."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, list | tuple):
            stack.extend(reversed(item))


@dataclass(frozen=True)
class Inputs(StatedInputs):
    """The known inputs of a model, from which it makes the arguments of `forward`.

    Attributes:
        values: the first elements of named inputs of integers, which would be zeros otherwise.
        with_values: the named inputs that keep their values in a pass on the meta device: shapes depend on them.
    """

    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    with_values: frozenset[str] = frozenset()

    def tensors(self, device: str) -> Arguments:
        """Make the arguments, on meta or with random values (normally distributed; integer tensors are zeros).

        Raises RequestError if a position is missing or an input is stated twice.
        """
        made: list[Any] = []
        with seeded(0):
            for index, shape in enumerate(self.shapes):
                name = self.dtypes[min(index, len(self.dtypes) - 1)] if self.dtypes else self.floating
                made.append(_tensor(shape, name, device))
            tree: dict[str, Any] = {}
            for item in input_texts.numbered(self.named, len(made)):
                if item.shape is None:
                    _put(tree, item.path, item.value)
                else:
                    ones = item.path[-1] == "attention_mask"
                    name = ".".join(item.path)
                    place = "cpu" if device == "meta" and name in self.with_values else device
                    tensor = _tensor(item.shape, item.dtype or self.usual_dtype(item.path), place, ones=ones)
                    _put(tree, item.path, self._with_values(name, tensor))
        arguments = {name: self._built(value, (name,)) for name, value in tree.items()}
        if self.as_list:
            made = [made]
        positions = sorted((name for name in arguments if name.isdecimal()), key=int)
        for name in positions:
            if int(name) != len(made):
                raise RequestError(f"input {name} is stated, but input {len(made)} is not", input_texts.EXAMPLES)
            made.append(arguments.pop(name))
        return Arguments(tuple(made), arguments)

    def _with_values(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Write the known values into the beginning of an input."""
        known = self.values.get(name, ())[: tensor.numel()]
        if known and not tensor.is_meta:
            tensor.view(-1)[: len(known)] = torch.tensor(known, dtype=tensor.dtype, device=tensor.device)
        return tensor

    def usual_dtype(self, path: Sequence[str]) -> str:
        """Return the dtype of an input that states none: int64 for tokens and masks, else the model's own."""
        last = path[-1]
        whole = last.endswith("_ids") or last in ("labels", "attention_mask", "tokens")
        return "int64" if whole else self.floating

    def _built(self, value: Any, path: tuple[str, ...]) -> Any:
        """Make a dict, or a list if the keys are 0, 1, 2 and so on."""
        if not isinstance(value, _Items):
            return value
        items = {key: self._built(item, (*path, key)) for key, item in value.items()}
        if sorted(items, key=lambda key: (len(key), key)) != [str(index) for index in range(len(items))]:
            return items
        found = [items[str(index)] for index in range(len(items))]
        return tuple(found) if len(path) == 1 and path[0] in self.tuples else found


class _Items(dict[str, Any]):
    """The items of an argument that dotted names state."""


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *above, last = path
    for step in above:
        tree = tree.setdefault(step, _Items())
        if not isinstance(tree, _Items):
            raise RequestError(
                f"input {'.'.join(path)} is stated, but an input that contains it is stated too", input_texts.EXAMPLES
            )
    if last in tree:
        raise RequestError(f"input {'.'.join(path)} is stated twice")
    tree[last] = value


def _tensor(shape: tuple[int, ...], dtype_name: str, device: str, *, ones: bool = False) -> torch.Tensor:
    dtype = getattr(torch, dtype_name)
    if device == "meta" or not (dtype.is_floating_point or dtype.is_complex):
        return (
            torch.full(shape, int(ones), dtype=dtype, device=device)
            if ones
            else torch.zeros(shape, dtype=dtype, device=device)
        )
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)


def overridden(
    known: Inputs, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], texts: Sequence[InputText]
) -> Inputs:
    """The inputs that a model is known to take by name, some of them replaced, and others added.

    The batch size of what is stated, where it is one, holds for the other inputs as well.

    Args:
        known: the inputs that its provider makes, all of them named.
        shapes: the shapes that `--input-size` states, for the known inputs in their order.
        dtypes: their dtypes; the last one holds for the remaining shapes.
        texts: what `--input` states, by name or position.

    Raises RequestError for more shapes than there are known inputs, and where an input is stated twice.
    """
    names = [".".join(item.path) for item in known.named]
    if len(shapes) > len(names):
        raise RequestError(
            f"{len(shapes)} input sizes are stated, and the model takes {len(names)} inputs: {listed(names, 8)}",
            "--input NAME=SHAPE states another one",
        )
    stated: dict[tuple[str, ...], InputText] = {}
    by_size = [
        replace(item, shape=shape, dtype=dtypes[min(index, len(dtypes) - 1)] if dtypes else item.dtype)
        for index, (item, shape) in enumerate(zip(known.named, shapes, strict=False))
    ]
    for item in (*by_size, *input_texts.numbered(texts, len(by_size))):
        position = item.path[0]
        if position.isdecimal() and int(position) < len(names):
            item = replace(item, path=(names[int(position)], *item.path[1:]))
        if item.path in stated:
            raise RequestError(f"input {'.'.join(item.path)} is stated twice")
        stated[item.path] = item
    batches = {item.shape[0] for item in stated.values() if item.shape}
    batch = batches.pop() if len(batches) == 1 else 1
    replaced = {path[0] for path in stated}
    kept = {item.path: _with_batch(item, batch) for item in known.named if item.path[0] not in replaced}
    usual = {item.path: item.dtype for item in known.named}
    for path, item in stated.items():
        kept[path] = item if item.dtype or item.shape is None else replace(item, dtype=usual.get(path))
    order = {item.path: index for index, item in enumerate(known.named)}
    return replace(known, named=tuple(sorted(kept.values(), key=lambda item: order.get(item.path, len(order)))))


def _with_batch(item: InputText, batch: int) -> InputText:
    is_batch = item.shape is not None and len(item.shape) > 1 and item.shape[0] == 1
    return replace(item, shape=(batch, *item.shape[1:])) if is_batch and item.shape is not None else item


def fitted(inputs: Inputs, module: nn.Module, further: Collection[str] | None = None) -> Inputs:
    """Check the inputs against the signature of `forward`, and find out which arguments need tuples.

    Args:
        inputs: the inputs.
        module: the model.
        further: what `forward` takes by its `**kwargs`; None where nobody knows, so that it may be any name.

    Raises RequestError if `forward` has no argument of a stated name.
    """
    try:
        parameters = list(signatures.of(module.forward).parameters.values())
    except (TypeError, ValueError):
        return inputs
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for item in inputs.named:
        if not item.path or item.path[0].isdecimal() or item.path[0] in names:
            continue
        if not has_kwargs or (further is not None and item.path[0] not in further):
            hint = did_you_mean(item.path[0], names) or (f"it takes {listed(names, 8)}" if names else None)
            raise RequestError(f"forward of {type(module).__name__} has no argument {item.path[0]!r}", hint)
    tuples = {p.name for p in parameters if "uple" in str(p.annotation)}
    tuples |= {str(position) for position, name in enumerate(by_position) if name in tuples}
    return replace(inputs, tuples=frozenset(tuples))


def own_inputs(module: nn.Module) -> Inputs | None:
    """Return the inputs that a model itself declares: Lightning's example, or none if `forward` has no argument."""
    try:
        example = getattr(module, "example_input_array", None)
    except Exception:  # it may be a property that raises anything
        example = None
    if example is not None and (found := _as_example(example)) is not None:
        return found
    try:
        takes = signatures.of(module.forward).parameters
    except (TypeError, ValueError):
        return None
    return Inputs(()) if not takes else None


def _as_example(example: Any) -> Inputs | None:
    """Read `example_input_array` of a `LightningModule`: a tensor, a tuple of arguments, or a dict of them by name."""
    if isinstance(example, torch.Tensor):
        example = (example,)
    named: list[InputText] = []

    def add(path: tuple[str, ...], value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            named.append(InputText(path, tuple(value.shape), str(value.dtype).removeprefix("torch.")))
        elif value is None or isinstance(value, bool | int | float | str):
            named.append(InputText(path, None, value=value))
        elif isinstance(value, Mapping):
            return all(add((*path, str(key)), item) for key, item in value.items())
        elif isinstance(value, list | tuple):
            return all(add((*path, str(index)), item) for index, item in enumerate(value))
        else:
            return False
        return True

    if not isinstance(example, Mapping | list | tuple) or not add((), example):
        return None
    return Inputs((), named=tuple(named))


def how_to_state_input(module: nn.Module) -> str:
    """Return the options that would state the input of a model whose input is not known."""
    try:
        parameters = signatures.of(module.forward).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    variable = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p for p in parameters if p.default is p.empty and p not in variable]
    if len(needed) <= 1 and not any(p.kind is p.KEYWORD_ONLY for p in needed):
        return "pass --input-size, batch included"
    return f"pass {' '.join(f'--input {p.name}=SHAPE' for p in needed)}, batch included"

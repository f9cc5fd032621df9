"""dequantize: multiply fp8 weights by the scales beside them, which are removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.declaring import TENSORS, Kind, Operand, option, selector
from modelcli.edits.key_surgery import numbers_of, numbers_text
from modelcli.edits.picking import count_at, groups_of, names_of_one
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError, did_you_mean
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.dequantized import PRODUCTS, Dequantized, NoBlockSizeError, block_of
from modelcli.model.dtypes import FLOATING, ITEM_BYTES, dtype_called
from modelcli.model.scaled_weights import (
    Scaled,
    activation_scales,
    is_packed,
    is_plain_fp8,
    method_of,
    scaled_weights,
)
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.model.strides import row_major
from modelcli.providers import quantization
from modelcli.wording import counted, listed

#: How many names a note lists.
_LISTED = 3


def _block(flag: str, word: str) -> tuple[int, ...]:
    found = numbers_of(word, "sizes", f"{flag} 128,128", least=1)
    if len(found) != 2:
        raise RequestError(f"{flag} takes the rows and the columns of a block, not {word!r}", f"{flag} 128,128")
    return found


def _dtypes() -> Iterable[str]:
    return sorted(name for name in FLOATING if not name.startswith("float8"))


@dataclass(frozen=True, kw_only=True)
class Dequantize(Selecting):
    """Give the matching fp8 weights the values that they stand for: each element times the scale of its block."""

    targets: tuple[str, ...]
    dtype: str
    block: tuple[int, ...] | None = option(
        "--block",
        Kind(_block, text=numbers_text),
        None,
        "The rows and columns of a block, where neither the configuration nor the shapes say it: 128,128.",
        metavar="ROWS,COLUMNS",
    )

    name: ClassVar[str] = "dequantize"
    summary: ClassVar[str] = "Multiply fp8 weights by the scales beside them, which are removed."
    effect: ClassVar[str] = (
        "multiplies fp8 weights by their scales (`NAME_scale_inv`, `NAME_scale`: per tensor, per row, in blocks), in "
        "float32, rounds once, and removes the scales"
    )
    in_pytorch: ClassVar[str] = "`(weight.float() * scale_of_each_element).to(torch.bfloat16)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli dequantize . bfloat16 -m fp8.safetensors -o out.safetensors",
        "modelcli dequantize mlp float32 -m fp8.safetensors",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors, then the dtype: bfloat16, float32.",
            "TARGET... DTYPE",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS, _dtypes),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("dequant", "unquantize", "decompress")
    handler: ClassVar[str] = "modelcli.live.surgery.dequantize"
    changes_dtype: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("dequantize takes at least one target and a dtype", "dequantize . bfloat16")
        dtype = dtype_called(words[-1])
        if dtype not in _dtypes():
            near = did_you_mean(dtype, list(_dtypes())) or "one of bfloat16, float16, float32, float64"
            raise RequestError(f"{words[-1]!r} is not a dtype for weights without scales", near)
        return cls(targets=tuple(map(selector, words[:-1])), dtype=dtype)

    def operands(self) -> list[str]:
        return [*self.targets, self.dtype]

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        found = dequantizing(self, model, context.quantization)
        new = {
            model.tensors[each.weight].identity: _product(
                model.tensors[each.weight], model.tensors[each.scale], each, self
            )
            for each in found.weights
        }
        gone = set(found.removed)
        entries = {
            name: new.get(entry.identity, entry) if isinstance(entry, StateDictTensor) else entry
            for name, entry in model.entries.items()
            if name not in gone
        }
        made = StateDictModel(entries, model.modules, described_modules=model.module_infos)
        inputs = context.inputs
        if inputs is not None:
            inputs = inputs.with_floating(made.floating_dtype or inputs.floating)
        return Applied(made, [*found.changes], [*found.notes], inputs)


@dataclass(frozen=True)
class Weight:
    """A weight to dequantize, its scale, and the rows and columns that have one scale: None for all elements."""

    weight: str
    scale: str
    block: tuple[int, int] | None


@dataclass(frozen=True)
class Dequantizing:
    """The weights, the keys that are removed, the rows of the result, and notes.

    Tied names of a weight each have their own entry in `weights`.
    """

    weights: tuple[Weight, ...]
    removed: tuple[str, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def dequantizing(edit: Dequantize, model: StateDictModel, described: Mapping[str, Any] | None) -> Dequantizing:
    """Find the weights to dequantize and their block sizes.

    Args:
        edit: the edit.
        model: the model before it.
        described: what the `config.json` says of the quantization.

    Raises RequestError for weights of other methods, for a scale that is missing or does not fit, and for a block size
    that nothing says.
    """
    blueprint = model.blueprint
    dtypes = {tensor.name: tensor.dtype for tensor in blueprint.tensors}
    pairs = scaled_weights(dtypes)
    picked = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    chosen = [name for name in picked if name in pairs and pairs[name].weight == name]
    for name in chosen:
        if not is_plain_fp8(pairs[name], dtypes):
            raise _other_method(name, method_of(pairs[name], dtypes, quantization.method_in(described)))
    bare = [name for name in picked if dtypes[name].startswith("float8") and name not in pairs]
    packed = [name for name in picked if is_packed(dtypes[name], len(blueprint.by_name[name].shape or ()))]
    if not chosen and (method := quantization.method_in(described)) is not None and packed and packed != bare:
        raise _other_method(next(name for name in packed if name not in bare), method)
    if bare:
        raise RequestError(
            f"{bare[0]} is {dtypes[bare[0]]}, and neither {bare[0]}_scale_inv nor {bare[0]}_scale is there",
            f"if its values need no scale, cast it: cast {quoted(selectors.literal(bare[0]))} {edit.dtype}; "
            "--except leaves it as it is",
        )
    if not chosen:
        raise RequestError(
            f"nothing to dequantize: {', '.join(edit.targets)} has no fp8 weights with scales",
            "modelcli params shows the dtypes",
        )
    size = edit.block or quantization.block_size(described)
    stated = None if size is None else (size[0], size[1])
    scales = _scales_of_tied(model, chosen, pairs)
    weights = [
        Weight(name, scale, _block_of(edit, model, pairs[chosen[0]], name, scale, stated))
        for name, scale in scales.items()
    ]
    groups = groups_of(edit.targets, blueprint, [each.weight for each in weights])
    selectors.require_expected(edit.expect, [path for path, _ in groups])
    own_scales = [pairs[name].scale for name in scales if name in pairs]
    activations = [found for name in scales for found in activation_scales(name, model.tensors)]
    notes = []
    if activations:
        notes.append(
            f"removed {listed(activations, _LISTED)}: scales of inputs and outputs mean nothing for weights "
            "without scales"
        )
    changes = _changes(edit, model, groups, {each.weight: each for each in weights})
    there = count_at({pair.weight for pair in pairs.values()} | scales.keys())
    whole = [[path] if there[path] == len(below) else below for path, below in groups]
    line = Dequantize(
        targets=tuple(selectors.literal(name) for names in whole for name in names), dtype=edit.dtype, block=stated
    )
    changes[0] = replace(changes[0], resolved=(str(line),))
    return Dequantizing(tuple(weights), (*dict.fromkeys((*own_scales, *activations)),), tuple(changes), tuple(notes))


def _other_method(weight: str, method: str) -> RequestError:
    return RequestError(
        f"{weight} is quantized by {method}, which dequantize does not know: it knows fp8 "
        "elements times one scale for each block, row or tensor",
        "leave it out with --except, or dequantize it with the program that wrote it",
    )


def _scales_of_tied(model: StateDictModel, chosen: Sequence[str], pairs: Mapping[str, Scaled]) -> dict[str, str]:
    """Return the scale of each chosen weight and of all other names that tied ones have."""
    of_weight: dict[int, str] = {}
    for name in chosen:
        weight, scale = (_plain(model, key) for key in (name, pairs[name].scale))
        other = of_weight.setdefault(weight.identity, pairs[name].scale)
        if model.tensors[other].identity != scale.identity:
            raise RequestError(
                f"{name} has two scales, {other} and {pairs[name].scale}, because it is one tensor with several names",
                f"give each name a tensor of its own first: untie {quoted(selectors.literal(name))}",
            )
    tied = {name for names in names_of_one(model.blueprint) for name in names}
    found = {name: pairs[name].scale for name in chosen}
    for name in tied:
        if (tensor := model.tensors.get(name)) is not None and tensor.identity in of_weight:
            found.setdefault(name, of_weight[tensor.identity])
    return found


def _plain(model: StateDictModel, name: str) -> StateDictTensor:
    """Return a weight or a scale. Raises RequestError for one without values that can be multiplied."""
    tensor = model.entries.get(name)
    if not isinstance(tensor, StateDictTensor) or tensor.shape is None or tensor.source is None:
        layout = model.blueprint.by_name[name].layout
        raise RequestError(f"{name} is no dense tensor with values: its layout is {layout}", "--except leaves it out")
    return tensor


def _block_of(
    edit: Dequantize, model: StateDictModel, first: Scaled, name: str, scale: str, stated: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the block size of a weight. Raises RequestError if its scale does not fit, or nothing says the size."""
    shape, own = _plain(model, name).shape or (), _plain(model, scale)
    if own.dtype not in FLOATING:
        raise RequestError(
            f"{scale} is {own.dtype}, and the scale of an fp8 weight is a floating-point tensor",
            f"--except {quoted(selectors.literal(name))} leaves the weight out",
        )
    try:
        return block_of(shape, own.shape or (), stated)
    except NoBlockSizeError as error:
        raise RequestError(
            f"{name} has the shape {list(shape)} and its scale {scale} {list(own.shape or ())}: {error}",
            f"--block states the size: {replace(edit, block=(128, 128))}"
            if stated is None
            else f"--except {quoted(selectors.literal(name))} leaves the weight out",
        ) from None


def _product(weight: StateDictTensor, scale: StateDictTensor, each: Weight, edit: Dequantize) -> StateDictTensor:
    """Return the dequantized weight. It keeps the identity, and so its place among the keys."""
    return replace(
        weight,
        dtype=edit.dtype,
        stride=row_major(weight.shape or ()),
        offset=0,
        source=Dequantized(weight, scale, each.block),
        cast_from=() if edit.dtype == PRODUCTS else (PRODUCTS,),
        copied=0,
    )


def _changes(
    edit: Dequantize,
    model: StateDictModel,
    groups: Sequence[tuple[str, list[str]]],
    weights: Mapping[str, Weight],
) -> list[Change]:
    changes = []
    for path, below in groups:
        own = {model.tensors[name].identity: model.tensors[name] for name in below}
        scales = {tensor.identity: tensor for name in below for tensor in [model.tensors[weights[name].scale]]}
        size = _parameters(own.values())
        was = sum(each.elements * ITEM_BYTES[each.dtype] for each in (*own.values(), *scales.values()))
        now = sum(each.elements for each in own.values()) * ITEM_BYTES[edit.dtype]
        blocks = {_told(model.tensors[name], weights[name]) for name in below}
        how = blocks.pop() if len(blocks) == 1 else f"{counted(len(scales), 'scale tensor')}"
        before = f"{', '.join(dict.fromkeys(each.dtype for each in own.values()))}, {how}"
        after = size + _parameters(scales.values())
        changes.append(Change(path, edit.name, before, edit.dtype, after, size, nbytes=(was, now)))
    return changes


def _parameters(tensors: Iterable[StateDictTensor]) -> int:
    return sum(tensor.elements for tensor in tensors if tensor.kind == "parameter")


def _told(weight: StateDictTensor, each: Weight) -> str:
    """Return how many elements have one scale, in short."""
    if each.block is None:
        return "one scale"
    if each.block == (1, (weight.shape or ())[-1]):
        return "a scale for each row"
    return f"scales of {each.block[0]}x{each.block[1]} blocks"


__all__ = ["Dequantize", "Dequantizing", "Weight", "dequantizing"]

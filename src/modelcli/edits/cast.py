"""cast: convert floating-point tensors to another dtype."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.declaring import TENSORS, Operand, selector
from modelcli.edits.picking import count_at, dense_notes, groups_of, names_of_one, tie_notes
from modelcli.edits.scaled import NOT_KNOWN, hint_to_dequantize
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError, did_you_mean
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import FLOATING, ITEM_BYTES, dtype_called
from modelcli.model.paths import parent_of, shown
from modelcli.model.scaled_weights import is_packed, is_plain_fp8, scaled_weights
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.providers import quantization
from modelcli.wording import counted


def _dtypes() -> Iterable[str]:
    return sorted(FLOATING)


@dataclass(frozen=True, kw_only=True)
class Cast(Selecting):
    """Convert the matching floating-point tensors to another dtype."""

    targets: tuple[str, ...]
    dtype: str

    name: ClassVar[str] = "cast"
    summary: ClassVar[str] = "Convert floating-point tensors to another dtype."
    effect: ClassVar[str] = (
        "converts floating-point tensors; refuses weights that have scales (block-scaled fp8, GPTQ, AWQ, "
        "bitsandbytes), and counts values that became Inf"
    )
    in_pytorch: ClassVar[str] = "`.to(torch.bfloat16)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli cast . bfloat16 -m best.pth -o half.pth",
        "modelcli cast . half -m squeezenet1_1",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors, then the dtype: bfloat16, half.",
            "TARGET... DTYPE",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS, _dtypes),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("to",)
    handler: ClassVar[str] = "modelcli.live.surgery.cast"
    changes_dtype: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("cast takes at least one target and a dtype", "cast . bfloat16")
        dtype = dtype_called(words[-1])
        if dtype not in FLOATING:
            near = did_you_mean(dtype, FLOATING) or "one of float32, bfloat16, float16, float64"
            raise RequestError(f"{words[-1]!r} is not a floating-point dtype", near)
        return cls(targets=tuple(map(selector, words[:-1])), dtype=dtype)

    def operands(self) -> list[str]:
        return [*self.targets, self.dtype]

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        found = casting(self, model.blueprint, model.tensors.keys(), context.quantization)
        chosen = model.by_identity(found.names)
        names: dict[int, str] = {}
        for name, tensor in model.tensors.items():
            names.setdefault(tensor.identity, name)
        for identity, tensor in chosen.items():
            require_conversion(tensor.dtype, self.dtype, names[identity])
        for views in _shared_storages(model, chosen):
            for before in {view.dtype for view in views if view.identity in chosen}:
                refuse_overlap(
                    (*view.byte_span, view.identity in chosen and view.dtype == before, names[view.identity])
                    for view in views
                    if view.elements
                )
        model = model.with_tensors(lambda tensor: tensor.cast(self.dtype), found.names)
        inputs = context.inputs
        if inputs is not None:
            inputs = inputs.with_floating(model.floating_dtype or inputs.floating)
        return Applied(model, [*found.changes], [*found.notes], inputs)


@dataclass(frozen=True)
class Casting:
    """The tensors whose dtype changes, and notes."""

    names: tuple[str, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def casting(
    edit: Cast, blueprint: Blueprint, tensors: Collection[str], described: Mapping[str, Any] | None = None
) -> Casting:
    """Find the tensors to cast.

    Args:
        edit: the edit.
        blueprint: the model before it.
        tensors: the names of those that can be converted.
        described: what the `config.json` says of the quantization.
    """
    known = blueprint.by_name
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    floating = [name for name in names if name in tensors and known[name].dtype.startswith(("float", "bfloat"))]
    if not floating:
        raise RequestError(
            f"nothing to cast: {', '.join(edit.targets)} has no floating-point tensors",
            "modelcli params shows the dtypes",
        )
    _refuse_scaled(edit, blueprint, floating)
    if (method := quantization.method_in(described)) is not None:
        _refuse_beside_packed(blueprint, floating, method)
    groups = groups_of(edit.targets, blueprint, floating)
    selectors.require_expected(edit.expect, [path for path, _ in groups])
    changes, notes = [], tie_notes(names_of_one(blueprint), floating, "cast")
    notes += dense_notes(names, tensors)
    for path, below in groups:
        own = {known[name].identity: known[name] for name in below}
        before = dict.fromkeys(tensor.dtype for tensor in own.values())
        if list(before) == [edit.dtype]:
            notes.append(f"{shown(path)} is {edit.dtype} already")
            continue
        size = sum(tensor.elements for tensor in own.values() if tensor.kind == "parameter")
        was = sum(tensor.elements * ITEM_BYTES[tensor.dtype] for tensor in own.values())
        now = sum(tensor.elements for tensor in own.values()) * ITEM_BYTES[edit.dtype]
        changes.append(Change(path, edit.name, ", ".join(before), edit.dtype, size, size, nbytes=(was, now)))
    if changes:
        line = str(Cast(targets=tuple(_cast_targets(blueprint, groups)), dtype=edit.dtype))
        changes[0] = replace(changes[0], resolved=(line,))
    return Casting(tuple(name for name in floating if known[name].dtype != edit.dtype), tuple(changes), tuple(notes))


def _refuse_scaled(edit: Cast, blueprint: Blueprint, names: Sequence[str]) -> None:
    """Raise RequestError if a cast would include a weight that has a scale, or a scale: it would change the weights."""
    dtypes = {tensor.name: tensor.dtype for tensor in blueprint.tensors}
    pairs = scaled_weights(dtypes)
    if (name := next((name for name in names if name in pairs), None)) is None:
        return
    pair = pairs[name]
    many = len({pairs[name].weight for name in names if name in pairs})
    there = set(names)
    own = [each for each in dict.fromkeys(pairs.values()) if {each.weight, each.scale} & there]
    is_same_work = not edit.without and all(is_plain_fp8(each, dtypes) and each.weight in there for each in own)
    more = f", and {counted(many - 1, 'weight')} more like it" if many > 1 else ""
    raise RequestError(
        f"{pair.weight} is {pair.how}, whose values are its elements times {pair.scale}{more}: casting only one "
        "of them would change the weights",
        hint_to_dequantize(pair, dtypes, edit.dtype, edit.targets if is_same_work else None),
    )


def _refuse_beside_packed(blueprint: Blueprint, names: Sequence[str], method: str) -> None:
    """Raise RequestError if a cast would include a tensor beside packed weights, which may be their scales."""
    packed: dict[str, str] = {}
    for tensor in blueprint.tensors:
        if is_packed(tensor.dtype, len(tensor.shape or ())) and not tensor.dtype.startswith("float8"):
            packed.setdefault(parent_of(tensor.name), tensor.name)
    for name in names:
        if (weight := packed.get(parent_of(name))) is not None and name.rpartition(".")[2] != "bias":
            raise RequestError(
                f"{weight} is quantized by {method}, as the configuration says, and {name} beside it may be its "
                "scales: casting them would change the weights",
                NOT_KNOWN,
            )


def _cast_targets(blueprint: Blueprint, groups: Sequence[tuple[str, list[str]]]) -> list[str]:
    there = count_at(tensor.name for tensor in blueprint.tensors if tensor.dtype in FLOATING)
    found: list[str] = []
    for path, below in groups:
        found += [selectors.literal(path)] if there[path] == len(below) else map(selectors.literal, below)
    return found


def require_conversion(before: str, after: str, name: str) -> None:
    if before not in FLOATING:
        raise RequestError(f"torch does not convert {before} to {after}, and {name} is {before}", "--except leaves it")


def refuse_overlap(spans: Iterable[tuple[int, int, bool, str]]) -> None:
    """Raise RequestError if a tensor that is converted shares bytes with one that is not.

    `spans` are the first byte of each in their storage, the one after the last, whether it is converted, and its name.
    """
    furthest: dict[bool, tuple[int, str]] = {True: (0, ""), False: (0, "")}
    for start, end, converts, name in sorted(spans):
        reached, other = furthest[not converts]
        if start < reached:
            inside, outside = (name, other) if converts else (other, name)
            raise RequestError(
                f"{inside} and {outside} share memory, and casting {inside} alone would separate them",
                f"name both: {inside} {outside}",
            )
        furthest[converts] = max(furthest[converts], (end, name))


def _shared_storages(model: StateDictModel, chosen: Collection[int]) -> Iterator[list[StateDictTensor]]:
    """The distinct tensors that view each storage which has several, one of them in `chosen`."""
    first: dict[object, StateDictTensor] = {}
    several: dict[object, dict[int, StateDictTensor]] = {}
    for tensor in model.tensors.values():
        if tensor.source is None or tensor.shape is None:
            continue
        key = tensor.storage
        other = first.setdefault(key, tensor)
        if other.identity != tensor.identity:
            several.setdefault(key, {other.identity: other})[tensor.identity] = tensor
    return (list(views.values()) for views in several.values() if any(key in chosen for key in views))

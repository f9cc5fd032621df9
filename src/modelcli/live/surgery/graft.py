"""graft: take the values of a module's tensors from another model or checkpoint.

The keys are matched by torch's own `load_state_dict` on a copy on the meta device, with the hooks of the classes. The
tensors of the model then get the bytes of the source's tensors, which are read when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from modelcli.checkpoints.copied import Copied
from modelcli.edits.applied import Applied, Context
from modelcli.edits.graft import Graft
from modelcli.edits.graft.keys import taking_of_keys
from modelcli.edits.graft.matching import (
    accept,
    module_at,
    notes_of_values,
    refuse_shared_bytes,
    require_same_values,
    row_of,
)
from modelcli.edits.graft.source_part import Part, part_of
from modelcli.edits.init import Init
from modelcli.edits.lines import parse
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.expressions import Call
from modelcli.live import loading
from modelcli.live.describe import describe, dtype_name
from modelcli.live.loading import LoadReport, StateDict
from modelcli.live.meta_models import meta_copy, tagged
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import delete_statements, dict_statement, quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import (
    AnySource,
    Computed,
    converted,
    copy_into,
    is_composite,
    is_lazy,
    named_tensors,
    real_storage,
    row_major,
)
from modelcli.live.surgery import init
from modelcli.live.surgery.core import blueprint_of, submodule
from modelcli.live.surgery.schemes import DEFAULT
from modelcli.live.surgery.state_dicts import meta_tensors
from modelcli.live.surgery.storages import key_of, shown_by
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined
from modelcli.values.casting import can_cast
from modelcli.wording import listed


def carry_out(module: nn.Module, edit: Graft, context: Context) -> Applied[nn.Module]:
    blueprint = blueprint_of(module, context)
    path = module_at(edit, blueprint)
    part = part_of(edit, context)
    found = _matched(submodule(module, path), edit, path, part)
    refuse_shared_bytes(shown_by(module), found.values)
    _refuse_conflicts(found, path, part, context)
    tensors = named_tensors(module)
    names = list(found.values)
    dtypes = {name: dtype_name(tensor.dtype) for name, tensor in found.values.items()}
    changes = row_of(edit, part, path, blueprint, names)
    notes = [*part.notes, *found.notes, *notes_of_values(blueprint, names, dtypes)]
    if edit.also_init and (missing := found.without_values(blueprint)):
        notes += _initialised(module, missing, context)
    for tensor, values in {id(tensors[name]): (tensors[name], found.values[name]) for name in names}.values():
        _take(tensor, values)
    return Applied(module, changes, notes, context.inputs)


@dataclass(frozen=True)
class _Matched:
    """How the tensors of a part of the source fit those of a module.

    Attributes:
        path: the path of the module.
        report: how the keys match; its names start at the module.
        values: the tensor of the source, on the meta device, for each name of a tensor of the model.
        not_dense: the keys of both that are no dense tensors here or there.
        notes: what there is to say.
    """

    path: str
    report: LoadReport
    values: Mapping[str, torch.Tensor]
    not_dense: tuple[str, ...]
    notes: tuple[str, ...]

    def without_values(self, blueprint: Blueprint) -> list[str]:
        """Return the names of the tensors of the model that get no values of the source."""
        names = [*self.report.missing, *(mismatch.name for mismatch in self.report.mismatched)]
        full = [joined(self.path, name) for name in names]
        return [name for name in full if name in blueprint.by_name]


def _matched(module: nn.Module, edit: Graft, path: str, part: Part) -> _Matched:
    """Match a part of the source with a module by loading it into a copy without values."""
    others = set(part.others)
    copied = meta_copy(module)
    for parameter in copied.parameters():
        parameter.requires_grad = False  # integers, which are converted, cannot be trained
    sparse = {name for name, tensor in named_tensors(copied).items() if is_lazy(tensor) or is_composite(tensor)}
    state = copied.state_dict(keep_vars=True)
    sparse |= {name for name, value in state.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: tensor.detach() for name, tensor in meta_tensors(part.model, list(part.tensors)).items()}
    given = StateDict(dict(tensors), part.metadata, dict.fromkeys(others, _no_value))
    unwrapped, found = loading.compare(copied, given)
    not_dense = tuple(
        name for name in state if name in unwrapped.extras or (name in sparse and name in unwrapped.tensors)
    )
    left = set(not_dense)
    kept = {name: tensor for name, tensor in tensors.items() if found.unwrapping.key(name) not in left}
    known = {key_of(tensor) for tensor in kept.values()}
    extras = {name: _no_value for name in others if found.unwrapping.key(name) not in left}
    report = loading.load(copied, StateDict(kept, part.metadata, extras), optional=frozenset(left | sparse))
    if not report.unwrapping:
        report = replace(report, unwrapping=found.unwrapping)
    loaded, own = named_tensors(copied), named_tensors(module)
    if loaded.keys() != own.keys():
        raise RequestError(f"{type(module).__name__} makes other tensors when it loads these", "graft parts of it")
    values = {
        joined(path, name): tensor
        for name, tensor in loaded.items()
        if name not in sparse and not is_lazy(tensor) and not is_composite(tensor) and key_of(tensor) in known
    }
    notes = accept(edit, part, path, report, not_dense)
    return _Matched(path, report, values, not_dense, tuple(notes))


def _no_value() -> None:
    """Stand for an entry of the source that is no tensor, whose value is not needed."""


def _refuse_conflicts(found: _Matched, path: str, part: Part, context: Context) -> None:
    """Raise RequestError where the source has different values for the names of one tensor."""
    keys = {found.report.unwrapping.key(name): name for name in part.tensors}
    for name, last in found.report.overruled:
        names = joined(path, name), joined(path, last)
        require_same_values(context, names, (keys[name], keys[last]), part.tensors)


def _initialised(module: nn.Module, names: Sequence[str], context: Context) -> list[str]:
    """Initialise tensors by their modules' own reset_parameters. Returns the notes on that."""
    edit = Init(targets=tuple(map(selectors.literal, names)), scheme=Call(DEFAULT))
    applied = init.carry_out(module, edit, context)
    names = [change.path for change in applied.changes]
    return [f"initialised anew: {listed(names, 5)}", *applied.notes]


def _take(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Give a tensor of the model the values of another one of its shape, converted to its dtype.

    It keeps its strides if it fills its storage without gaps, as torch's `copy_` does.
    """
    values = values.reshape(tensor.shape) if values.shape != tensor.shape else values
    strides = tensor.stride()
    axes = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
    if not tensor.permute(axes).is_contiguous():
        axes = list(range(tensor.dim()))
    data = torch.empty([tensor.size(axis) for axis in axes], dtype=tensor.dtype, device="meta")
    if tensor.is_meta:
        source = _in_dtype(values.permute(axes), tensor.dtype)
        data.set_(tagged(source.nbytes, Copied(source)), 0, data.size(), data.stride())
    else:
        data = torch.empty_like(data, device="cpu")
        copy_into(data, values.permute(axes))
        data = data.to(tensor.device)
    back = [axes.index(axis) for axis in range(tensor.dim())]
    tensor.data = data.permute(back)


def _in_dtype(values: torch.Tensor, dtype: torch.dtype) -> AnySource:
    """Return the elements of a tensor on the meta device in row-major order, converted to another dtype."""
    source = row_major(values)
    if values.dtype == dtype:
        return source
    flat = torch.empty(0, dtype=values.dtype, device="meta")
    flat.set_(tagged(source.nbytes, source), 0, (values.numel(),), (1,))
    if can_cast(dtype_name(values.dtype), dtype_name(dtype)):
        return converted(flat, dtype)

    def compute(start: int, nbytes: int) -> torch.UntypedStorage:
        first, count, size = start // dtype.itemsize, nbytes // dtype.itemsize, values.dtype.itemsize
        made = torch.empty(count, dtype=dtype)
        part = torch.empty(0, dtype=values.dtype)
        made.copy_(part.set_(real_storage(source.part(first * size, count * size)), 0, (count,), (1,)))
        return made.untyped_storage()

    return Computed(values.numel() * dtype.itemsize, compute, (source,))


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Graft, step: Step) -> list[str]:
    blueprint = describe(step.before)
    context = Context(step.seed or 0, None, True, blueprint, step.sources)
    path = module_at(edit, blueprint)
    part = part_of(edit, context)
    module = submodule(step.before, path)
    found = _matched(module, edit, path, part)
    lines: list[str] = []
    if edit.also_init and (missing := found.without_values(blueprint)):
        copied = meta_copy(step.before, keep_values=True)
        reset = Init(targets=tuple(map(selectors.literal, missing)), scheme=Call(DEFAULT))
        (line,) = init.carry_out(copied, reset, context).changes[0].resolved
        whole = parse(line)
        assert isinstance(whole, Init)
        lines += init.script_lines(replace(whole, without=()), step)
    wrong = {mismatch.name for mismatch in found.report.mismatched}
    own = [name for name in module.state_dict() if name not in found.not_dense]
    unwrapping = found.report.unwrapping
    taken = {part.origins[name]: unwrapping.key(name) for name in part.tensors}
    taken = {origin: name for origin, name in taken.items() if name not in wrong | set(found.report.unexpected)}
    taken = {origin: name for origin, name in taken.items() if name not in found.not_dense}
    absent = set(own) - set(taken.values())
    strict = "" if not absent and not found.not_dense else ", strict=False"
    return [
        *lines,
        *_reading(step, part, taken),
        f"{access_paths.module_expression(step.before, path)}.load_state_dict(read_source(){strict})",
    ]


def _reading(step: Step | StateDictStep, part: Part, taken: Mapping[str, str]) -> list[str]:
    """Return the function that reads the source, and returns a state dict with the keys that are taken.

    Args:
        step: the step of the script.
        part: the part of the source.
        taken: the new name of each key of the source that is taken.
    """
    from modelcli.live import scripting

    body = step.script.inner()
    scripting.write_reading(body, part.opened.source, part.opened.opened)
    body.write(*_picked(part.opened.model.keys, taken), "return state")
    return ["def read_source():", *(f"    {line}" if line else "" for line in body.body), "", ""]


def _picked(keys: Sequence[str], taken: Mapping[str, str]) -> Iterator[str]:
    """Yield the statements that leave in `state` only the keys that are taken, under their new names."""
    prefixes = {old.removesuffix(new) if old.endswith(new) else None for old, new in taken.items()}
    prefix = prefixes.pop() if len(prefixes) == 1 else None
    if prefix is None:
        yield from dict_statement("names", taken.items())
        yield "state = {name: state[key] for key, name in names.items()}"
        return
    if prefix:
        key, start = f"key.removeprefix({quoted(prefix)})", quoted(prefix)
        yield f"state = {{{key}: value for key, value in state.items() if key.startswith({start})}}"
    left = set(taken.values())
    below = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    yield from delete_statements([name for name in below if name not in left])


def state_dict_script_lines(edit: Graft, step: StateDictStep, state: State) -> list[str]:
    context = Context(step.seed or 0, None, True, sources=step.sources)
    path = module_at(edit, step.before.blueprint)
    part = part_of(edit, context)
    taken = taking_of_keys(edit, step.before, path, part, context)
    prefix = joined(path, "")
    names = {part.origins[old]: name.removeprefix(prefix) for name, old in taken.names.items()}
    key = f"{quoted(prefix)} + key" if prefix else "key"
    scalar = any(step.before.tensors[name].shape != part.tensors[old].shape for name, old in taken.names.items())
    value = f"value.reshape(state[{key}].shape)" if scalar else "value"
    return [
        *_reading(step, part, names),
        "with torch.no_grad():",
        "    for key, value in read_source().items():",
        f"        state[{key}].copy_({value})",
    ]

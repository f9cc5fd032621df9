"""The shared core: `apply` carries out edits on a module, on the meta device or real, and says what changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli import expressions, selectors
from modelcli.blueprints import Blueprint, ancestors, shown
from modelcli.edits import Edit, Freeze, Replace, Unfreeze
from modelcli.errors import RequestError
from modelcli.expressions import HOLE, Call
from modelcli.live import memory, modules
from modelcli.live.build import Bare
from modelcli.live.describe import describe
from modelcli.live.sources import Lazy, is_lazy, named_tensors, tag_drawn
from modelcli.live.trace import flowing_into
from modelcli.live.twins import build_on_meta, seeded

if TYPE_CHECKING:
    from modelcli.live.opening import Inputs


@dataclass(frozen=True)
class Change:
    """What one edit did at one path.

    `resolved` are the lines of the edit that made it, selectors and `_` resolved,
    on the first change of each edit.
    """

    path: str
    action: str
    before: str
    after: str
    params_before: int
    params_after: int
    resolved: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Context:
    """What an edit may need to know besides the module: the seed of its numbers, and the model's input."""

    seed: int
    inputs: Inputs | None
    trusted: bool


def seed_of(seed: int, number: int) -> int:
    """The seed of edit `number` (from 1) of a model with this seed: `(seed * 1000003 + number) mod 2^63`."""
    return (seed * 1_000_003 + number) % 2**63


def apply(
    module: nn.Module,
    edits: Sequence[Edit],
    *,
    seed: int = 0,
    first: int = 1,
    inputs: Inputs | None = None,
    trusted: bool = True,
) -> list[Change]:
    """Carry out edits in order; `first` is the number of the first one, which decides its random numbers.

    On a meta module new modules are made on meta and drawn for real when their numbers are asked for; on a real one
    they are made at once. Raises RequestError for an edit that cannot be done; an edit that raises has changed
    nothing.
    """
    changes: list[Change] = []
    for number, edit in enumerate(edits, first):
        context = _Context(seed_of(seed, number), inputs, trusted)
        made = _CARRY_OUT[type(edit)](module, edit, context)
        changes += made
    return changes


# --- replace -------------------------------------------------------------------------------------------------------


def _replace(module: nn.Module, edit: Replace, context: _Context) -> list[Change]:
    blueprint = describe(module)
    paths = selectors.select_modules(blueprint, [edit.target], without=edit.without, expect=edit.expect)
    _refuse_expanded(edit, module)
    if "" in paths:
        raise RequestError(
            "the model itself cannot be replaced by a module", "name that as the model: -m 'Linear(4096,10)'"
        )
    selectors.refuse_nested(paths, "replace")
    places = _places(module)
    targets: dict[int, tuple[nn.Module, list[str]]] = {}
    for path in paths:
        old = module.get_submodule(path)
        targets.setdefault(id(old), (old, []))[1].append(path)
    for old, named in targets.values():
        everywhere = places[id(old)]
        if set(named) != set(everywhere):
            raise RequestError(
                f"{named[0]} is one module with {len(everywhere)} names ({', '.join(everywhere)}); "
                f"the selector names {len(named)} of them",
                "a selector that picks all its names replaces it everywhere",
            )
    calls = _resolved_calls(module, edit, [(old, named[0]) for old, named in targets.values()], context)
    make = _maker(module, calls, context, [(old, named[0]) for old, named in targets.values()])
    groups = list(zip(targets.values(), calls, make(), strict=True))
    lines = _resolved_lines(edit, [(named, call) for (_, named), call, _ in groups])
    changes = []
    for (old, named), _, new in groups:
        for path in named:
            parent, _, name = path.rpartition(".")
            module.get_submodule(parent)._modules[name] = new
            changes.append(Change(path, "replace", brief(old), brief(new), count(old), count(new)))
    return [replace(changes[0], resolved=tuple(lines)), *changes[1:]]


def _resolved_lines(edit: Replace, groups: Sequence[tuple[list[str], Call]]) -> list[str]:
    """The edit as lines without patterns: one for each module; a module with several names keeps its selector."""
    if all(len(named) == 1 for named, _ in groups):
        return [str(Replace(target=selectors.literal(named[0]), module=call)) for named, call in groups]
    if any(call != groups[0][1] for _, call in groups):
        raise RequestError(
            f"{edit.target} picks modules with several names, and _ differs between them",
            "replace them one by one",
        )
    return [str(replace(edit, module=groups[0][1]))]


def _places(module: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        found.setdefault(id(child), []).append(path)
    return found


def _refuse_expanded(edit: Replace, module: nn.Module) -> None:
    """`replace classifier.{1,4} ReLU` without quotes reaches us as two paths: say so instead of `no class`."""
    name = edit.module.name
    known = {path for path, _ in module.named_modules()}
    if name in known and "." in name:
        raise RequestError(
            f"{name} is a path of this model, not the name of a class",
            "the shell may have expanded a pattern: quote the target",
        )


def _resolved_calls(
    module: nn.Module, edit: Replace, targets: Sequence[tuple[nn.Module, str]], context: _Context
) -> list[Call]:
    """The expression for each target with every `_` filled in."""
    if not edit.module.has_hole:
        return [edit.module] * len(targets)
    holes = _Holes(module, edit.module, [path for _, path in targets], context)
    return [holes.filled(edit.module, old, path) for old, path in targets]


class _Holes:
    """Fills `_`: with the old module's attribute of that name, else with what flows in there on a forward pass."""

    def __init__(self, module: nn.Module, expression: Call, paths: Sequence[str], context: _Context) -> None:
        self.module = module
        self.expression = expression
        self.paths = paths
        self.context = context
        self.flows: dict[str, torch.Tensor] | None = None

    def filled(self, call: Call, old: nn.Module, path: str) -> Call:
        """A call, nested ones included, as it is to be made in place of `old`."""
        if not call.has_hole:
            return call
        kind = modules.find_class(call.name, trusted=self.context.trusted)
        names = modules.parameter_names(kind)
        if len(call.args) > len(names) and "args" not in names:
            raise RequestError(f"{call}: {kind.__name__} takes {len(names)} arguments", modules.signature_of(kind))
        named = [*zip(call.args, [*names, *[""] * len(call.args)], strict=False)]
        args = tuple(self._value(value, name, old, path) for value, name in named)
        return Call(call.name, args, {key: self._value(value, key, old, path) for key, value in call.kwargs.items()})

    def _value(self, value: Any, name: str, old: nn.Module, path: str) -> Any:
        if value == HOLE:
            return self._fill(name, old, path)
        if isinstance(value, Call):
            return self.filled(value, old, path)
        if expressions.holds_hole(value):
            raise RequestError(
                f"{self.expression}: _ stands for a whole argument, not for a part of one", "write it out"
            )
        return value

    def _fill(self, name: str, old: nn.Module, path: str) -> Any:
        if (value := _attribute(old, name)) is not None:
            return value
        if self.flows is None:
            self.flows = flowing_into(self.module, self.paths, self.context.inputs)
        flow = self.flows.get(path)
        if flow is not None and (size := argument_from(name, tuple(flow.shape))) is not None:
            return size
        if isinstance(old, Bare):
            raise RequestError(
                f"{self.expression} at {path}: _ for {name} is not known: the file does not say what was there",
                f"--arch names its architecture; or write {name} out",
            )
        raise RequestError(
            f"{self.expression} at {path}: _ for {name} is not known: the old {type(old).__name__} has no {name}, "
            + ("and what flows in does not tell" if flow is not None else "and no forward pass reached it"),
            f"write {name} out, or give --input-size",
        )


def _attribute(old: nn.Module, name: str) -> Any:
    """The old module's value for a constructor argument, where it is a plain one."""
    value = getattr(old, name, None)
    if name == "bias" and (value is None or isinstance(value, torch.Tensor)):
        return value is not None if "bias" in old._parameters else None
    if isinstance(value, torch.Size):
        return tuple(value)
    return value if isinstance(value, bool | int | float | str | tuple | list) else None


#: Which axis of what flows in gives an argument of this name. Channels are the second axis, features the last.
_AXES = {
    "in_features": -1,
    "normalized_shape": -1,
    "input_size": -1,
    "embed_dim": -1,
    "d_model": -1,
    "in_channels": 1,
    "num_channels": 1,
    "num_features": 1,
    "num_parameters": 1,
}


def argument_from(name: str, shape: tuple[int, ...]) -> int | None:
    """The value that a constructor argument takes from the shape of what flows in, or None where it takes none."""
    axis = _AXES.get(name)
    return None if axis is None or not -len(shape) <= axis < len(shape) else shape[axis]


def _maker(
    module: nn.Module, calls: Sequence[Call], context: _Context, targets: Sequence[tuple[nn.Module, str]]
) -> Callable[[], list[nn.Module]]:
    """What makes the new modules of one edit: all drawn from one generator, in order."""
    # A dtype that the expression itself states is taken at its word.
    own_dtype = any(expressions.gives(call, "dtype") for call in calls)
    settings = [(None if own_dtype else _dtype_near(module, old, path), old.training) for old, path in targets]

    def for_real() -> list[nn.Module]:
        with seeded(context.seed):
            made = [modules.make(call, trusted=context.trusted) for call in calls]
        return [_settled(new, *setting) for new, setting in zip(made, settings, strict=True)]

    def on_meta() -> list[nn.Module]:
        made = [
            build_on_meta(lambda call=call: modules.make(call, trusted=context.trusted), only_if_needed=True)  # type: ignore[misc]
            for call in calls
        ]
        made = [_settled(new, *setting) for new, setting in zip(made, settings, strict=True)]
        memory.require(sum(map(memory.bytes_of, made)), str(calls[0]))
        holder = nn.ModuleList(made)
        tag_drawn(holder, Lazy(lambda: nn.ModuleList(for_real())))
        return made

    def in_two_steps() -> list[nn.Module]:
        on_meta()  # finds wrong arguments and sizes before anything is allocated
        return for_real()

    return on_meta if _is_meta(module) else in_two_steps


def _is_meta(module: nn.Module) -> bool:
    tensors = [tensor for tensor in named_tensors(module).values() if not is_lazy(tensor)]
    return any(tensor.is_meta for tensor in tensors)


def _settled(new: nn.Module, dtype: torch.dtype | None, training: bool) -> nn.Module:
    if dtype is not None and any(
        tensor.is_floating_point() and tensor.dtype != dtype for tensor in named_tensors(new).values()
    ):
        new = new.to(dtype)
    return new.train(training)


def _dtype_near(module: nn.Module, old: nn.Module, path: str) -> torch.dtype | None:
    """The floating dtype of the old module, else of its nearest relative with parameters."""
    for above in ancestors(path):
        relative = module.get_submodule(above) if above else module
        for tensor in (*old.parameters(), *old.buffers(), *relative.parameters()):
            if tensor.dtype.is_floating_point:
                return tensor.dtype
    return None


def brief(module: nn.Module) -> str:
    """A module in one short line, as the call that makes it where its printed form tells that.

    `Linear(in_features=4096, out_features=10, bias=True)` is `Linear(4096, 10)`: defaults are left out, and leading
    arguments lose their names.
    """
    if isinstance(module, Bare):
        return f"{len(list(module.parameters()))} tensors"
    name, config = str(module._get_name()), module.extra_repr()
    if len(module._modules) or "\n" in config:
        return name
    try:
        parameters = list(inspect.signature(type(module)).parameters.values())
        call = expressions.parse(f"{name}({config})")
    except (RequestError, ValueError, TypeError):
        return f"{name}({config})"
    defaults = {parameter.name: parameter.default for parameter in parameters}
    args, kwargs = list(call.args), dict(call.kwargs)
    for parameter in parameters[len(args) :]:
        if parameter.default is not inspect.Parameter.empty or parameter.name not in kwargs:
            break
        args.append(kwargs.pop(parameter.name))
    kept = {key: value for key, value in kwargs.items() if key not in defaults or value != defaults[key]}
    parts = [_spaced(value) for value in args] + [f"{key}={_spaced(value)}" for key, value in kept.items()]
    return f"{name}({', '.join(parts)})"


def _spaced(value: Any) -> str:
    return expressions.to_text(value)


def count(module: nn.Module) -> int:
    """`sum(p.numel() for p in module.parameters())`, lazy parameters counting nothing."""
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


# --- freeze, unfreeze ----------------------------------------------------------------------------------------------


def _set_flags(module: nn.Module, edit: Freeze | Unfreeze, context: _Context) -> list[Change]:
    trained = isinstance(edit, Unfreeze)
    blueprint = describe(module)
    for target in edit.targets:
        sizes = [blueprint.params_of(path) for path in selectors.matched_modules(selectors.parse(target), blueprint)]
        if sizes and not any(sizes) and not any(map(is_lazy, module.parameters())):
            raise RequestError(
                f"nothing to {edit.name}: {target} has no parameters", "modelcli params shows where they are"
            )
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    chosen = {name for name in names if name in parameters}
    if not chosen:
        raise RequestError(
            f"nothing to {edit.name}: {', '.join(edit.targets)} has no parameters",
            "modelcli params shows where they are",
        )
    tensors = {id(parameters[name]): parameters[name] for name in chosen}
    if trained:
        for name in chosen:
            if not (parameters[name].is_floating_point() or parameters[name].is_complex()):
                raise RequestError(f"{name} is {parameters[name].dtype}: only floating-point tensors can be trained")
    changes = []
    groups = _groups(edit, blueprint, chosen)
    if edit.expect is not None and len(groups) != edit.expect:
        listed = ", ".join(shown(path) for path, _ in groups[:5]) + (", ..." if len(groups) > 5 else "")
        raise RequestError(f"{len(groups)} match, not the {edit.expect} expected: {listed}")
    for path, below in groups:
        own = {id(parameters[name]): parameters[name] for name in below}
        before = _flags([p.requires_grad for p in own.values()])
        size = sum(p.numel() for p in own.values() if not is_lazy(p))
        after = "trainable" if trained else "frozen"
        if edit.without and len(below) < _parameters_at(blueprint, path):
            after += f" except {', '.join(edit.without)}"
        changes.append(Change(path, edit.name, before, after, size, size))
    for tensor in tensors.values():
        tensor.requires_grad_(trained)
    line = str(type(edit)(targets=tuple(_resolved_targets(blueprint, edit, chosen))))
    return [replace(changes[0], resolved=(line,)), *changes[1:]]


def _resolved_targets(blueprint: Blueprint, edit: Freeze | Unfreeze, chosen: set[str]) -> list[str]:
    """Literal paths: a module where all its parameters were chosen, else the tensors one by one."""
    found: list[str] = []
    for path, below in _groups(edit, blueprint, chosen):
        whole = len(below) == _parameters_at(blueprint, path)
        found += [selectors.literal(path)] if whole else map(selectors.literal, below)
    return found


def _groups(edit: Freeze | Unfreeze, blueprint: Blueprint, chosen: set[str]) -> list[tuple[str, list[str]]]:
    """The parameters by the outermost module or tensor that a target names: one row each."""
    tops: dict[str, list[str]] = {}
    named: set[str] = set()
    for target in edit.targets:
        selector = selectors.parse(target)
        named |= selectors.matched_modules(selector, blueprint)
    for name in blueprint.by_name:
        if name in chosen:
            holders = [path for path in list(ancestors(name))[1:] if path in named]
            tops.setdefault(holders[-1] if holders else name, []).append(name)
    return list(tops.items())


def _parameters_at(blueprint: Blueprint, path: str) -> int:
    """How many parameters a path names: its own, or those of the module at it and below."""
    names = (tensor.name for tensor in blueprint.tensors if tensor.kind == "parameter")
    return sum(not path or name == path or name.startswith(f"{path}.") for name in names)


def _flags(flags: Sequence[bool]) -> str:
    return "trainable" if all(flags) else "frozen" if not any(flags) else "partly frozen"


_CARRY_OUT: dict[type[Edit], Callable[[nn.Module, Any, _Context], list[Change]]] = {
    Replace: _replace,
    Freeze: _set_flags,
    Unfreeze: _set_flags,
}

__all__ = ["Change", "apply", "argument_from", "brief", "count", "seed_of"]

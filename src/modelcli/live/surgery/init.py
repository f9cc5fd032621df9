"""init: new values for parameters, drawn by a function of `torch.nn.init` or a module's own `reset_parameters`."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.init import Init
from modelcli.edits.picking import groups_of, names_of_one, tie_notes
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.live import memory, signatures
from modelcli.live.describe import describe, dtype_name
from modelcli.live.meta_models import meta_copy, seeded
from modelcli.live.script import access_paths
from modelcli.live.script.grouped_calls import each
from modelcli.live.script.source_text import STATEMENTS, InexpressibleError, SourceText, loop
from modelcli.live.script.source_text import quoted as literal
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import Drawn, Lazy, is_lazy, named_tensors
from modelcli.live.surgery.core import blueprint_of, submodule
from modelcli.live.surgery.schemes import DEFAULT, Scheme, scheme_name, scheme_of
from modelcli.live.surgery.state_dicts import meta_tensors, viewing
from modelcli.live.surgery.storages import copied, has_storage, key_of, replace_storage, shown_by, viewers
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors, joined, lies_in, parent_of, shown
from modelcli.model.shared_bytes import Shown, sharing_bytes
from modelcli.model.state_dict import StateDictModel, StateDictModule, StateDictTensor
from modelcli.wording import listed

#: Layers that start at weight 1 and bias 0, whatever scheme the layers around them get.
NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def carry_out(module: nn.Module, edit: Init, context: Context) -> Applied[nn.Module]:
    blueprint = blueprint_of(module, context)
    selected = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    tensors = named_tensors(module)
    names = [name for name in selected if name in tensors]
    if not names:
        raise _nothing(edit)
    if scheme_name(edit.scheme) == DEFAULT:
        drawing = _resets(module, edit, blueprint, names)
    else:
        drawing = _fills(edit, blueprint, names, tensors, _layers_of(module, blueprint))
    changes = _changes(edit, blueprint, names, drawing)
    views = viewers(module)
    chosen = {id(tensors[name]) for name in drawing.filled}
    for key, source in _drawn(drawing, views, chosen, context.seed).items():
        replace_storage(views[key], source)
    notes = _told(drawing, blueprint, selected, names, shown_by(module))
    return Applied(module, changes, notes, context.inputs)


def _changes(edit: Init, blueprint: Blueprint, names: Sequence[str], drawing: Drawing) -> list[Change]:
    """A row for each outermost module or tensor that a target names."""
    known = blueprint.by_name
    filled = {known[name].identity: text for name, text in drawing.filled.items()}
    groups = groups_of(edit.targets, blueprint, {name for name in names if known[name].identity in filled})
    selectors.require_expected(edit.expect, [path for path, _ in groups])
    changes = []
    for path, below in groups:
        own = {known[name].identity: known[name] for name in below}
        size = sum(tensor.elements for tensor in own.values() if tensor.kind == "parameter")
        after = min((filled[key] for key in own), key=drawing.texts.index)
        changes.append(Change(path, edit.name, "as it was", after, size, size))
    return [replace(changes[0], resolved=drawing.lines), *changes[1:]]


def _told(
    drawing: Drawing,
    blueprint: Blueprint,
    selected: Sequence[str],
    names: Sequence[str],
    shown: Mapping[str, Shown],
) -> list[str]:
    """The notes on an edit; `names` are those of the selected tensors that can be drawn."""
    notes = [*drawing.notes, *tie_notes(names_of_one(blueprint), names, "initialised")]
    notes += _view_notes(shown, set(drawing.filled))
    dense = set(names)
    return notes + [f"{name} keeps its values: it is not a dense tensor" for name in selected if name not in dense]


def _view_notes(shown: Mapping[str, Shown], filled: set[str]) -> list[str]:
    """Notes on other tensors that share memory with the initialised ones."""
    views = [
        f"{name} shares memory with {picked}, so its values change too"
        for name, picked in sharing_bytes(shown, filled).items()
    ]
    return views if len(views) <= 3 else [*views[:3], f"{len(views) - 3} more tensors change with them"]


@dataclass(frozen=True)
class Drawing:
    """What one edit draws.

    `filled` says by its first name how each tensor is filled, in one of `texts`, the most telling first. `tensors` are
    the model's that are needed for it, `old` the same with the numbers that they have now, and `fill` writes into real
    twins of them, in their order. `lines` are the edit with literal paths.
    """

    filled: Mapping[str, str]
    texts: Sequence[str]
    tensors: Sequence[torch.Tensor]
    old: Sequence[torch.Tensor]
    fill: Callable[[Sequence[torch.Tensor]], None]
    lines: tuple[str, ...]
    notes: list[str]
    overwrites: bool = True


def _drawn(
    drawing: Drawing, views: Mapping[int, Sequence[torch.Tensor]], chosen: Collection[int], seed: int
) -> dict[int, Drawn]:
    """New bytes for the storages of the chosen tensors, given by their `id`, which are drawn when they are asked for.

    `views` are the tensors that view each storage, which all see what is drawn.
    """
    keys = [key_of(tensor) for tensor in drawing.tensors]
    blank = {key for key in keys if drawing.overwrites and _is_alone(views[key])}
    wanted = list(dict.fromkeys(key for key, tensor in zip(keys, drawing.tensors, strict=True) if id(tensor) in chosen))
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in zip(keys, drawing.old, strict=True)}
    old, fill = drawing.old, drawing.fill  # without the model's own tensors, which will hold what is built here

    def build() -> nn.Module:
        memory.require(sum(sizes.values()), "init")
        fresh: dict[int, torch.UntypedStorage] = {}
        real = []
        for key, tensor in zip(keys, old, strict=True):
            if key not in fresh:
                fresh[key] = _zeros(sizes[key]) if key in blank else copied(tensor)
            empty = torch.empty(0, dtype=tensor.dtype)
            real.append(empty.set_(fresh[key], tensor.storage_offset(), tensor.size(), tensor.stride()))
        with seeded(seed), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say was said when the edit was made
            fill(real)
        holder = nn.Module()
        for key in wanted:
            holder.register_buffer(str(key), torch.empty(0, dtype=torch.uint8).set_(fresh[key]))
        return holder

    lazy = Lazy(build)
    return {key: Drawn(lazy, str(key), sizes[key]) for key in wanted}


def _is_alone(views: Sequence[torch.Tensor]) -> bool:
    """Whether one tensor shows all of its storage, and no other does: what is drawn leaves no old number."""
    return len(views) == 1 and views[0].numel() * views[0].element_size() == views[0].untyped_storage().nbytes()


def _zeros(nbytes: int) -> torch.UntypedStorage:
    return torch.zeros(nbytes, dtype=torch.uint8).untyped_storage()


# --- state-dict models ------------------------------------------------------------------------------------------------


def apply_to_state_dict(edit: Init, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
    """The model with new bytes for what is picked; they are drawn when they are written."""
    blueprint = model.blueprint
    selected = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    names = [name for name in selected if name in model.tensors]
    if not names:
        raise _nothing(edit)
    if scheme_name(edit.scheme) == DEFAULT:
        _refuse_arguments_of_default(edit)
        raise RequestError(
            "default calls each module's reset_parameters, but a plain state dict records no classes",
            "pass --arch REFERENCE, or name a scheme: xavier_uniform",
        )
    tensors = meta_tensors(model, viewing(model, names))
    drawing = _fills(edit, blueprint, names, tensors, _layers_of_keys(model))
    changes = _changes(edit, blueprint, names, drawing)
    views: dict[int, dict[int, torch.Tensor]] = {}
    storages: dict[int, object] = {}
    for name, tensor in tensors.items():
        if has_storage(tensor):
            views.setdefault(key_of(tensor), {})[id(tensor)] = tensor
            storages[key_of(tensor)] = model.tensors[name].storage
    chosen = {id(tensors[name]) for name in drawing.filled}
    drawn = _drawn(drawing, {key: list(found.values()) for key, found in views.items()}, chosen, context.seed)
    notes = _told(drawing, blueprint, selected, names, model.shown)
    sources = {storages[key]: source for key, source in drawn.items()}
    return Applied(model.with_sources(sources), changes, notes, context.inputs)


def _layers_of_keys(model: StateDictModel) -> _Layers:
    """A module of unknown type normalises where it keeps a running mean."""

    def own(path: str, name: str) -> StateDictTensor | None:
        return model.tensors.get(joined(path, name))

    def keeps_mean(path: str) -> bool:
        mean = own(path, "running_mean")
        return mean is not None and mean.kind == "buffer"

    def holder(path: str) -> StateDictModule | None:
        return model.modules.get(path)  # a key such as `..weight` is in no module but the root

    def made(path: str) -> nn.Module | None:
        return None if (module := holder(path)) is None else module.made

    def may_normalise(name: str) -> bool:
        path = parent_of(name)
        weight, bias = own(path, "weight"), own(path, "bias")
        known = (module := holder(path)) is not None and module.info is not None
        if known or not name.endswith("weight") or weight is None or bias is None:
            return False
        return len(weight.shape or ()) == 1 and weight.shape == bias.shape and not keeps_mean(path)

    norms = {
        path
        for path, module in model.modules.items()
        if (keeps_mean(path) if module.info is None else isinstance(module.made, NORMALISATIONS))
    }
    return _Layers(norms, made, may_normalise)


# --- what is filled -------------------------------------------------------------------------------------------------

_ONES, _ZEROS = Call("ones"), Call("zeros")
_NORMALISED = "weight 1, bias 0"


@dataclass
class _Sorted:
    """The selected parameters, each under its first name, by what becomes of them."""

    weights: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    normalised: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layers:
    """What is known of the modules around tensors.

    `norms` are the paths of those that normalise. `holder` gives the module at a path where its class is known.
    `may_normalise` tells of a tensor whether its module could be a LayerNorm for all that is known.
    """

    norms: Collection[str]
    holder: Callable[[str], nn.Module | None]
    may_normalise: Callable[[str], bool]


def _layers_of(module: nn.Module, blueprint: Blueprint) -> _Layers:
    norms = {info.path for info in blueprint.modules if isinstance(submodule(module, info.path), NORMALISATIONS)}
    return _Layers(norms, lambda path: submodule(module, path), lambda _name: False)


def _fills(
    edit: Init, blueprint: Blueprint, names: Sequence[str], tensors: Mapping[str, torch.Tensor], layers: _Layers
) -> Drawing:
    """Weights by the scheme, biases by theirs; normalisation layers 1 and 0, unless a target picks nothing else."""
    weight, bias = scheme_of(edit.scheme), scheme_of(edit.bias)
    parameters = [name for name in names if blueprint.by_name[name].kind == "parameter"]
    if not parameters:
        raise _nothing(edit)
    first = {id(tensors[name]): name for name in reversed(parameters)}
    distinct = [name for name in parameters if first[id(tensors[name])] == name]
    parts = _sorted(edit, blueprint, distinct, tensors, layers)
    warned = _leave_out_refused(parts, tensors, weight, bias)
    schemes = dict.fromkeys(parts.weights, weight) | dict.fromkeys(parts.biases, bias)
    ones, zeros = scheme_of(_ONES), scheme_of(_ZEROS)
    schemes |= {name: zeros if is_bias(name) else ones for name in parts.normalised}
    if not schemes:
        raise _nothing(edit, parts.kept)
    ordered = [name for name in parameters if name in schemes]

    def fill(real: Sequence[torch.Tensor]) -> None:
        for name, tensor in zip(ordered, real, strict=True):
            schemes[name].fill(tensor)

    texts = (weight.text, _NORMALISED, bias.text)
    filled = {name: _NORMALISED if name in set(parts.normalised) else schemes[name].text for name in ordered}
    lines = []
    if parts.weights or parts.biases:
        drawn = [name for name in ordered if name not in set(parts.normalised)]
        lines.append(str(replace(edit, targets=_literals(drawn), without=(), expect=None)))
    if parts.normalised:
        lines.append(str(Init(targets=_literals(parts.normalised), scheme=_ONES)))
    chosen = [tensors[name] for name in ordered]
    notes = [*warned, *_notes(layers, parts, edit)]
    return Drawing(filled, texts, chosen, [tensor.detach() for tensor in chosen], fill, tuple(lines), notes)


def _sorted(
    edit: Init,
    blueprint: Blueprint,
    parameters: Sequence[str],
    tensors: Mapping[str, torch.Tensor],
    layers: _Layers,
) -> _Sorted:
    """Sort parameters by name and by the module that holds them."""
    norms = layers.norms
    alone: set[str] = set()
    for target in edit.targets:
        picked = selectors.matched_tensors(selectors.parse(target), blueprint)
        picked = {name for name in picked if blueprint.by_name[name].kind == "parameter"}
        if all(parent_of(name) in norms for name in picked):
            alone |= picked
    parts = _Sorted()
    for name in parameters:
        if (why := _unfit(tensors[name])) is not None:
            parts.kept[name] = why
        elif parent_of(name) in norms and name not in alone:
            parts.normalised.append(name)
        else:
            (parts.biases if is_bias(name) else parts.weights).append(name)
    return parts


def is_bias(name: str) -> bool:
    """`bias`, `in_proj_bias`, `bias_ih_l0`."""
    own = name.rpartition(".")[2]
    return own == "bias" or own.endswith("_bias") or own.startswith("bias_")


def _unfit(tensor: torch.Tensor) -> str | None:
    """Why no scheme is for a tensor, or None."""
    if is_lazy(tensor):
        return "it has no shape yet"
    if not tensor.is_floating_point() or not has_storage(tensor):
        return f"it is {dtype_name(tensor.dtype)}" if has_storage(tensor) else "it is not a dense tensor"
    return None


def _leave_out_refused(parts: _Sorted, tensors: Mapping[str, torch.Tensor], weight: Scheme, bias: Scheme) -> list[str]:
    """Move what a scheme cannot fill to what is kept; gives what torch warns of.

    Raises RequestError where a scheme can fill nothing of what it is for.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scheme, names in ((weight, parts.weights), (bias, parts.biases)):
            refused = {name: why for name in names if (why := scheme.refusal(tensors[name])) is not None}
            if refused and len(refused) == len(names):
                name, why = next(iter(refused.items()))
                flat = all(tensors[name].dim() < 2 for name in refused)
                hint = "normal, uniform, constant, ones and zeros fill any tensor" if flat else scheme.signature
                raise RequestError(f"{scheme.text} fills nothing: {name}: {why}", hint)
            names[:] = [name for name in names if name not in refused]
            parts.kept |= {name: f"{scheme.text} does not fill such a tensor: {why}" for name, why in refused.items()}
    return list(dict.fromkeys(str(warning.message) for warning in caught))


def _notes(layers: _Layers, parts: _Sorted, edit: Init) -> list[str]:
    notes, scheme = _kept_notes(parts.kept), scheme_of(edit.scheme).text
    if parts.normalised:
        number = len({parent_of(name) for name in parts.normalised})
        notes.append(
            f"{number} normalisation {'layer gets' if number == 1 else 'layers get'} weight 1 and bias 0: "
            "a target that picks nothing else gives them a scheme"
        )
    unsure = [name for name in parts.weights if layers.may_normalise(name)]
    if unsure:
        notes.append(
            f"{listed(unsure, 5)} may belong to normalisation layers, because the file records no classes: "
            f"{scheme} was used for them; --except leaves them unchanged, --arch REFERENCE names the classes"
        )
    own = {
        type(holder).__name__: name
        for name in reversed(parts.weights)
        if (holder := layers.holder(parent_of(name))) is not None and _is_called_norm(holder)
    }
    for kind, name in own.items():
        notes.append(
            f"{kind} is no normalisation layer of torch.nn, but is called like one: {scheme} went into {name}; "
            f"--except {quoted(f'**:{kind}')} leaves them as they are"
        )
    return notes


def _holder(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(parent_of(name))


def _is_called_norm(module: nn.Module) -> bool:
    """Whether a class that no scheme spares calls itself a normalisation."""
    return "norm" in type(module).__name__.lower() and not isinstance(module, NORMALISATIONS)


def _kept_notes(kept: Mapping[str, str]) -> list[str]:
    """A note for each reason why tensors keep their values."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, why in kept.items():
        by_reason[why].append(name)
    return [
        f"{listed(names, 5)} {'keeps its' if len(names) == 1 else 'keep their'} values: {why}"
        for why, names in by_reason.items()
    ]


def _literals(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(map(selectors.literal, names))


def _nothing(edit: Init, kept: Mapping[str, str] | None = None) -> RequestError:
    targets = ", ".join(edit.targets)
    if kept:
        name, why = next(iter(kept.items()))
        return RequestError(f"nothing to initialise in {targets}: {name}: {why}")
    return RequestError(f"nothing to initialise: {targets} has no parameters", "modelcli params lists the parameters")


# --- default -------------------------------------------------------------------------------------------------------


def _refuse_arguments_of_default(edit: Init) -> None:
    if edit.scheme.args or edit.scheme.kwargs:
        raise RequestError(f"{edit.scheme}: default takes no arguments")
    if edit.bias != _ZEROS:
        raise RequestError("default resets biases together with the weights, so it excludes --bias")


def _resets(module: nn.Module, edit: Init, blueprint: Blueprint, names: Sequence[str]) -> Drawing:
    """The modules' own `reset_parameters`, called on copies of them: what is selected takes its tensors from there."""
    _refuse_arguments_of_default(edit)
    paths = _resettable(module, edit, blueprint, names)
    originals = nn.ModuleList(module.get_submodule(path) for path in paths)
    below = {name for name in names if lies_in(parent_of(name), paths)}
    tensors = named_tensors(module)
    hidden = {name for name in below if isinstance(_holder(module, name), ParametrizationList)}
    dense = {name for name in below - hidden if has_storage(tensors[name])}
    if not dense:
        raise RequestError(
            f"nothing to initialise: no module at or below {', '.join(edit.targets)} has reset_parameters with "
            "tensors to fill",
            "name a scheme: xavier_uniform",
        )
    # Taken now: what later edits do to the model is not to change what is drawn here.
    frozen = meta_copy(originals, keep_values=True)
    pairs = {
        id(tensor): (tensor, twin)
        for tensor, twin in zip(named_tensors(originals).values(), named_tensors(frozen).values(), strict=True)
        if has_storage(tensor)
    }

    twins = [twin for _, twin in pairs.values()]

    def fill(real: Sequence[torch.Tensor]) -> None:
        made = {id(twin): _like(twin, tensor) for twin, tensor in zip(twins, real, strict=True)}
        _reset(frozen, paths, made)

    first = {id(tensors[name]): name for name in reversed(names) if name in dense}
    filled = {name: DEFAULT for name in names if name in dense and first[id(tensors[name])] == name}
    picked = frozenset(names)
    excepted = [t.name for t in blueprint.tensors if t.name not in picked and lies_in(parent_of(t.name), paths)]
    line = str(Init(targets=_literals(paths), scheme=Call(DEFAULT), without=_literals(excepted)))
    kept = {
        name: "no module that holds it has reset_parameters"
        for name in names
        if name not in below and blueprint.by_name[name].kind == "parameter"
    } | {name: "reset_parameters does not reach through a parametrization" for name in names if name in hidden}
    return Drawing(
        filled,
        (DEFAULT,),
        [tensor for tensor, _ in pairs.values()],
        [twin.detach() for twin in twins],
        fill,
        (line,),
        _kept_notes(kept),
        overwrites=False,
    )


def _resettable(module: nn.Module, edit: Init, blueprint: Blueprint, names: Sequence[str]) -> dict[str, None]:
    """The paths, in order, of the modules to reset: they have something selected, and a target picks them, a module
    above them, or a tensor of their own."""
    matched: set[str] = set()
    for target in edit.targets:
        matched |= selectors.matched_modules(selectors.parse(target), blueprint)
    touched = {path for name in names for path in ancestors(parent_of(name))}
    holders = {parent_of(name) for name in names if not lies_in(parent_of(name), matched)}
    paths: dict[int, str] = {}
    for info in blueprint.modules:
        part = module.get_submodule(info.path)
        picked = info.path in holders or lies_in(info.path, matched)
        if picked and info.path in touched and _can_reset(part):
            paths.setdefault(id(part), info.path)
    return dict.fromkeys(paths.values())


def _can_reset(module: nn.Module) -> bool:
    """Whether a module has a `reset_parameters` that takes no arguments."""
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        return False
    try:
        signatures.of(reset).bind()
    except (TypeError, ValueError):
        return False
    return True


def _like(twin: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A real tensor as what its twin is: a parameter or a plain tensor."""
    return nn.Parameter(real, requires_grad=twin.requires_grad) if isinstance(twin, nn.Parameter) else real


def _reset(frozen: nn.Module, paths: Iterable[str], made: Mapping[int, torch.Tensor]) -> None:
    """Call `reset_parameters` of copies that have the real tensors `made` (by the `id` of the twin) in them."""
    memo: dict[int, Any] = dict(made)
    copies = copy.deepcopy(frozen, memo)
    given = named_tensors(copies)
    for path, part in zip(paths, copies.children(), strict=True):
        try:
            part.reset_parameters()  # type: ignore[operator]
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RequestError(f"reset_parameters of {shown(path)} {type(part).__name__}: {reason}") from error
    for name, tensor in named_tensors(copies).items():
        if name in given and tensor is not given[name] and tensor.shape == given[name].shape:
            given[name].copy_(tensor)  # the module put another tensor in its place


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Init, step: Step) -> list[str]:
    script, model, lines = step.script, step.before, step.seeded()
    blueprint = describe(model)
    if scheme_name(edit.scheme) == DEFAULT:
        if edit.without:
            raise InexpressibleError("reset_parameters draws all the tensors of a module, and some are kept here")
        paths = selectors.select_modules(blueprint, edit.targets)
        return [
            *lines,
            *each(paths, lambda path: access_paths.place(model, path), "get_submodule", ".reset_parameters()"),
        ]
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    infos = {blueprint.by_name[name].identity: name for name in reversed(names)}
    chosen = [name for name in names if name in infos.values() and blueprint.by_name[name].kind == "parameter"]
    script.imports.add("from torch.nn import init")
    return lines + fills(
        script, chosen, edit, lambda name: access_paths.tensor(model, name), "model.get_parameter(name)"
    )


def fills(script: SourceText, names: Sequence[str], edit: Init, text: Callable[[str], str], any_text: str) -> list[str]:
    """The calls that fill tensors in their order; runs of the same call become loops.

    `any_text` is the expression for the tensor that is called `name`.
    """
    lines: list[str] = []
    rest = list(names)
    if scheme_name(edit.bias) in ("zeros", "ones", "constant"):  # draws nothing, and so may come last
        rest = [name for name in names if not is_bias(name)] + [name for name in names if is_bias(name)]
    while rest:
        scheme = edit.bias if is_bias(rest[0]) else edit.scheme
        run = [rest[0]]
        while len(run) < len(rest) and is_bias(rest[len(run)]) == is_bias(run[0]):
            run.append(rest[len(run)])
        arguments = script.arguments(scheme.args, scheme.kwargs)
        arguments = f", {arguments}" if arguments else ""
        function = f"init.{scheme_name(scheme)}_"
        if len(run) > STATEMENTS:
            lines += loop("name", run, f"{function}({any_text}{arguments})")
        else:
            lines += [f"{function}({text(name)}{arguments})" for name in run]
        rest = rest[len(run) :]
    return lines


def state_dict_script_lines(edit: Init, step: StateDictStep, state: State) -> list[str]:
    if scheme_name(edit.scheme) == DEFAULT:
        raise InexpressibleError(
            f"plain PyTorch has no statements for {edit.name} on a file that records no architecture"
        )
    blueprint = step.before.blueprint
    chosen = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    chosen = [name for name in chosen if blueprint.by_name[name].tied_to not in chosen]
    step.script.imports.add("from torch.nn import init")
    return step.seeded() + fills(step.script, chosen, edit, lambda name: f"state[{literal(name)}]", "state[name]")

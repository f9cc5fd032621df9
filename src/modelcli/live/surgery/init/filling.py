"""init by a scheme: which function of `torch.nn.init` fills which parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from modelcli.edits.init import Init
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.live.describe import dtype_name
from modelcli.live.sources import is_lazy
from modelcli.live.surgery.core import submodule
from modelcli.live.surgery.init.drawing import Drawing, kept_notes, literals, nothing_to_initialise
from modelcli.live.surgery.schemes import Scheme, scheme_of
from modelcli.live.surgery.storages import has_storage
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined, parent_of
from modelcli.model.state_dict import StateDictModel, StateDictModule, StateDictTensor
from modelcli.wording import listed

#: Layers that `init` gives weight 1 and bias 0, whatever the scheme.
NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

ONES, ZEROS = Call("ones"), Call("zeros")
_NORMALISED = "weight 1, bias 0"


@dataclass(frozen=True)
class Layers:
    """What is known about the modules that have the tensors.

    `norms` are the paths of normalisation layers. `holder` returns the module at a path, or None if its class is not
    known. `may_normalise` says whether a tensor may belong to a normalisation layer of unknown class.
    """

    norms: Collection[str]
    holder: Callable[[str], nn.Module | None]
    may_normalise: Callable[[str], bool]


def layers_of(module: nn.Module, blueprint: Blueprint) -> Layers:
    norms = {info.path for info in blueprint.modules if isinstance(submodule(module, info.path), NORMALISATIONS)}
    return Layers(norms, lambda path: submodule(module, path), lambda _name: False)


def layers_of_keys(model: StateDictModel) -> Layers:
    """Return what a state dict shows about its modules: one of unknown class normalises if it has a running mean."""

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
    return Layers(norms, made, may_normalise)


@dataclass
class _Sorted:
    """The selected parameters, each under its first name, grouped by how they are initialised."""

    weights: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    normalised: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def drawing_by_scheme(
    edit: Init, blueprint: Blueprint, names: Sequence[str], tensors: Mapping[str, torch.Tensor], layers: Layers
) -> Drawing:
    """Fill weights by `edit.scheme`, biases by `edit.bias`.

    Normalisation layers get weight 1 and bias 0, unless a target picks nothing but normalisation layers.
    """
    weight, bias = scheme_of(edit.scheme), scheme_of(edit.bias)
    parameters = [name for name in names if blueprint.by_name[name].kind == "parameter"]
    if not parameters:
        raise nothing_to_initialise(edit)
    first = {id(tensors[name]): name for name in reversed(parameters)}
    distinct = [name for name in parameters if first[id(tensors[name])] == name]
    parts = _sorted(edit, blueprint, distinct, tensors, layers)
    warned = _leave_out_refused(parts, tensors, weight, bias)
    schemes = dict.fromkeys(parts.weights, weight) | dict.fromkeys(parts.biases, bias)
    ones, zeros = scheme_of(ONES), scheme_of(ZEROS)
    schemes |= {name: zeros if is_bias(name) else ones for name in parts.normalised}
    if not schemes:
        raise nothing_to_initialise(edit, parts.kept)
    ordered = [name for name in parameters if name in schemes]

    def fill(real: Sequence[torch.Tensor]) -> None:
        for name, tensor in zip(ordered, real, strict=True):
            schemes[name].fill(tensor)

    texts = (weight.text, _NORMALISED, bias.text)
    filled = {name: _NORMALISED if name in set(parts.normalised) else schemes[name].text for name in ordered}
    lines = []
    if parts.weights or parts.biases:
        drawn = [name for name in ordered if name not in set(parts.normalised)]
        lines.append(str(replace(edit, targets=literals(drawn), without=(), expect=None)))
    if parts.normalised:
        lines.append(str(Init(targets=literals(parts.normalised), scheme=ONES)))
    chosen = [tensors[name] for name in ordered]
    notes = [*warned, *_notes(layers, parts, edit)]
    return Drawing(filled, texts, chosen, [tensor.detach() for tensor in chosen], fill, tuple(lines), notes)


def _sorted(
    edit: Init,
    blueprint: Blueprint,
    parameters: Sequence[str],
    tensors: Mapping[str, torch.Tensor],
    layers: Layers,
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
    """Return why no scheme can fill a tensor, or None."""
    if is_lazy(tensor):
        return "it has no shape yet"
    if not tensor.is_floating_point() or not has_storage(tensor):
        return f"it is {dtype_name(tensor.dtype)}" if has_storage(tensor) else "it is not a dense tensor"
    return None


def _leave_out_refused(parts: _Sorted, tensors: Mapping[str, torch.Tensor], weight: Scheme, bias: Scheme) -> list[str]:
    """Move tensors that their scheme cannot fill to `parts.kept`. Returns the warnings of torch.

    Raises RequestError if a scheme can fill none of its tensors.
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


def _notes(layers: Layers, parts: _Sorted, edit: Init) -> list[str]:
    notes, scheme = kept_notes(parts.kept), scheme_of(edit.scheme).text
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


def _is_called_norm(module: nn.Module) -> bool:
    """Whether a class outside `NORMALISATIONS` has a name like a normalisation layer."""
    return "norm" in type(module).__name__.lower() and not isinstance(module, NORMALISATIONS)

"""Find the BatchNorms that can be folded into the layer before them: a convolution or a linear layer.

A forward pass in eval mode shows which layer that is. It looks at every operation, and at the bytes that each one takes
and gives: a layer is folded only if what it gives goes into one BatchNorm and nowhere else.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.errors import RequestError
from modelcli.live import providers, trace
from modelcli.live.describe import dtype_name
from modelcli.live.inputs import Arguments, Inputs, how_to_state_input, tensors_in
from modelcli.live.meta_models import meta_copy, real_copy
from modelcli.live.sources import is_composite, is_lazy
from modelcli.live.surgery.core import is_meta, paths_of_modules, submodule
from modelcli.live.surgery.storages import has_storage, key_of
from modelcli.model.dtypes import FLOATING
from modelcli.model.paths import shown
from modelcli.providers import owner as owner_of
from modelcli.wording import listed

#: The children that each of torch's BatchNorms calls behind the normalisation, by the class with their `forward`.
_NORMS: Mapping[str, tuple[str, ...]] = {
    "torch.nn.modules.batchnorm._BatchNorm": (),
    "torch.nn.modules.batchnorm.SyncBatchNorm": (),
}
#: What a folded tensor may be; torch computes with these.
_COMPUTED = FLOATING - {name for name in FLOATING if name.startswith("float8")}


@dataclass(frozen=True)
class Fold:
    """A BatchNorm and the layer that it is folded into, with all the paths of both, and what takes its place."""

    layer: nn.Module
    layer_paths: tuple[str, ...]
    norm: nn.Module
    norm_paths: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def transposed(self) -> bool:
        """Whether the layer is a transposed convolution, whose second axis is that of the output channels."""
        return isinstance(self.layer, _ConvTransposeNd)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm, of torch or of a library: it has running statistics, as its class says."""
    return isinstance(module, _BatchNorm) or "BatchNorm" in _class_with_forward(module).__name__


def folds(
    model: nn.Module, norms: Mapping[str, str | None], inputs: Inputs | None
) -> tuple[list[Fold], dict[str, str]]:
    """Find the BatchNorms that can be folded.

    Args:
        model: the model, on the meta device or real.
        norms: the paths of BatchNorms, each with the path of its layer where the user says it.
        inputs: what the model takes; None if nobody knows.

    Returns:
        The folds, and why each of the others cannot be folded, by path.

    Raises:
        RequestError: no forward pass can be made, and the model is not a Sequential of layers either.
    """
    everywhere = paths_of_modules(model)
    if inputs is not None:
        seen = _observed(model, inputs)
    elif all(norms.values()):
        seen = _Flows({everywhere[id(submodule(model, norm))][0]: layer for norm, layer in norms.items() if layer})
    else:
        seen = _in_sequence(model)
    found: dict[int, Fold] = {}
    kept: dict[str, str] = {}
    layers: dict[int, str] = {}
    owners = _owners(model)
    for path in norms:
        norm = submodule(model, path)
        if id(norm) in found:
            continue
        first = everywhere[id(norm)][0]
        why = _norm_refusal(norm, model)
        layer_path = seen.layers.get(first) or seen.refused.get(first)
        if why is None and layer_path is not None:
            why = _layer_refusal(submodule(model, layer_path), norm, owners, layer_path)
        why = why or seen.refusal(first)
        said = norms[path]
        if why is None and said is not None and submodule(model, said) is not submodule(model, seen.layers[first]):
            why = f"the layer before it is {layer_path}, not {said}"
        if why is None and (taken := layers.setdefault(id(submodule(model, seen.layers[first])), path)) != path:
            why = f"{layer_path} is folded with {taken} already"
        if why is not None:
            kept[path] = why
            continue
        layer = submodule(model, seen.layers[first])
        paths = tuple(everywhere[id(layer)]), tuple(everywhere[id(norm)])
        found[id(norm)] = Fold(layer, paths[0], norm, paths[1], _children_behind(norm) or ())
    return list(found.values()), kept


# --- what a module is ------------------------------------------------------------------------------------------------


def _class_with_forward(module: nn.Module) -> type:
    """Return the class in whose body the module's `forward` stands."""
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind) or kind is nn.Module)


def _children_behind(norm: nn.Module) -> tuple[str, ...] | None:
    """Return the children that a BatchNorm calls behind the normalisation; None if its forward is not known."""
    kind = _class_with_forward(norm)
    name = f"{kind.__module__}.{kind.__qualname__}"
    known = {**_NORMS, **{each: more for half in providers.in_use() for each, more in half.batch_norms.items()}}
    if name not in known and (library := owner_of(kind.__module__)) is not None:
        known = dict(providers.half_of(library).batch_norms)
    named = known.get(name)
    if named is None or "forward" in vars(norm):
        return None
    children = {name: norm._modules.get(name) for name in named}
    return tuple(name for name, child in children.items() if child is not None and type(child) is not nn.Identity)


def _norm_refusal(norm: nn.Module, model: nn.Module) -> str | None:
    """Return why a BatchNorm cannot be folded, as far as it alone tells."""
    kind = type(norm).__name__
    if _children_behind(norm) is None:
        return f"modelcli does not know what the forward of {_class_with_forward(norm).__name__} computes"
    if (hooked := _hooked(norm)) is not None:
        return f"the {kind} {hooked}"
    mean, var = (norm._buffers.get(name) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        return f"the {kind} has no running statistics, so it uses those of each batch"
    if norm.training and not model.training:
        return f"the {kind} is in train mode while the model is in eval mode, so it uses the statistics of each batch"
    own = (mean, var, *(tensor_of(norm, name) for name in ("weight", "bias")))
    return _tensors_refusal([tensor for tensor in own if tensor is not None], f"the {kind}")


def _layer_refusal(layer: nn.Module, norm: nn.Module, owners: Mapping[int, list[str]], path: str) -> str | None:
    """Return why nothing can be folded into a layer, as far as it and the BatchNorm tell."""
    if not isinstance(layer, _ConvNd | nn.Linear):
        return f"{path} is neither a convolution nor a linear layer"
    if (hooked := _hooked(layer)) is not None:
        return f"{path} {hooked}"
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if "forward" in vars(layer):
        return f"{path} has a forward of its own"
    if weight is None:
        return f"the weight of {path} is no parameter"
    if (why := _tensors_refusal([weight, *([] if bias is None else [bias])], path)) is not None:
        return why
    for tensor in (weight, bias):
        if tensor is not None and len(names := owners[key_of(tensor)]) > 1:
            others = [name for name in names if name.rpartition(".")[0] != path]
            return f"{names[0]} shares its values with {listed(others or names[1:], 2)}"
    if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
        return f"{path} is a transposed convolution with {layer.groups} groups, which torch.nn.utils.fusion cannot fold"
    outputs = weight.shape[1 if isinstance(layer, _ConvTransposeNd) else 0]
    features = tensor_of(norm, "running_mean")
    if features is None or tuple(features.shape) != (outputs,):
        return f"{path} has {outputs} outputs, and the BatchNorm is not over these"
    return None


def _hooked(module: nn.Module) -> str | None:
    """Return what changes a module's call besides its class: hooks or a parametrization."""
    if parametrize.is_parametrized(module):
        return "has a parametrization, which computes its tensors anew"
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "has hooks, which run with the old values" if any(getattr(module, name) for name in tables) else None


def _tensors_refusal(tensors: Sequence[torch.Tensor], whose: str) -> str | None:
    for tensor in tensors:
        if is_lazy(tensor):
            return f"the tensors of {whose} have no shape yet"
        if is_composite(tensor) or hasattr(tensor, "__tensor_flatten__"):
            return f"the tensors of {whose} are not plain dense tensors"
        if dtype_name(tensor.dtype) not in _COMPUTED:
            return f"the tensors of {whose} are {dtype_name(tensor.dtype)}, in which nothing is folded"
    return None


def tensor_of(module: nn.Module, name: str) -> torch.Tensor | None:
    """Return the parameter or buffer of a module with this name; None if it has none."""
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the tensors that show each storage; a tensor of a shared module has one name."""
    found: dict[int, dict[int, str]] = {}
    seen: set[tuple[int, str]] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or is_lazy(tensor) or not has_storage(tensor) or (id(module), own) in seen:
                continue
            seen.add((id(module), own))
            found.setdefault(key_of(tensor), {})[len(seen)] = f"{path}.{own}" if path else own
    return {key: list(names.values()) for key, names in found.items()}


# --- which layer is before a BatchNorm -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flows:
    """The layer whose output alone goes into each BatchNorm, by path, or why there is none."""

    layers: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = ""
    #: The layer whose output goes into a BatchNorm, among other things.
    refused: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, path: str) -> str | None:
        return None if path in self.layers else self.reasons.get(path, self.otherwise)


def _in_sequence(model: nn.Module) -> _Flows:
    """Find neighbours in a model that is a Sequential, also of Sequentials, which passes each output on.

    Only of two and three dimensions: whether a BatchNorm1d normalises the outputs of the layer before it depends on
    the shape of the input.
    """
    layers: dict[str, str] = {}

    def look(path: str, module: nn.Module) -> None:
        if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
            return
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        for (before, layer), (after, norm) in pairwise(children):
            of_images = (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)
            if (type(layer), type(norm)) in of_images and all(len(everywhere[id(m)]) == 1 for m in (layer, norm)):
                layers[after] = before
        for at, child in children:
            look(at, child)

    everywhere = paths_of_modules(model)
    look("", model)
    if not layers:
        raise RequestError(
            "no forward pass shows which layer is before each BatchNorm: the input size is not known",
            how_to_state_input(model),
        )
    return _Flows(layers, {}, "without an input size, only neighbours in a Sequential of 2 or 3 dimensions are certain")


def _observed(model: nn.Module, inputs: Inputs) -> _Flows:
    """Make a forward pass and find out where the output of each layer goes. Raises RequestError if the pass fails."""
    watches: list[_Watch] = []

    def attempt(subject: nn.Module, given: Arguments, device: str, outer: trace.Outer) -> trace.Pass:
        _add_biases(subject)
        watch = _Watch(subject)
        watches.append(watch)
        seen = trace.run(
            subject, given, device=device, visit=watch.visit, leave=watch.leave, modes=(*outer, watch), judged=False
        )
        watch.finish(seen.output)
        return seen

    try:
        subject = meta_copy(model)
    except Exception as error:
        raise RequestError(
            f"no forward pass shows which layer is before each BatchNorm: the model cannot be copied ({error})"
        ) from error
    real = (lambda: real_copy(subject, values=True)) if is_meta(model) else None
    ran = trace.on_some_device(subject, inputs, attempt, real=real)
    if ran.seen.failure is not None:
        raise RequestError(
            f"no forward pass shows which layer is before each BatchNorm: {ran.reason}", how_to_state_input(model)
        )
    return watches[-1].flows(model)


def _add_biases(model: nn.Module) -> None:
    """Give each layer without a bias one, as folding does: the pass shows whether its class adds it."""
    for module in {id(module): module for module in model.modules()}.values():
        if isinstance(module, _ConvNd | nn.Linear) and module._parameters.get("bias", module) is None:
            weight = module._parameters.get("weight")
            if weight is None or is_lazy(weight) or is_composite(weight):
                continue
            outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            zeros = torch.zeros(int(outputs), dtype=weight.dtype, device=weight.device)
            module._parameters["bias"] = nn.Parameter(zeros, requires_grad=False)


class _Watch(TorchDispatchMode):
    """Observes which operations use the weights of layers, and which use what the layers give."""

    def __init__(self, subject: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths = {key: paths[0] for key, paths in paths_of_modules(subject).items()}
        modules = {id(module): module for module in subject.modules()}
        self.layers = {key: module for key, module in modules.items() if isinstance(module, _ConvNd | nn.Linear)}
        self.norms = {key: module for key, module in modules.items() if is_norm(module)}
        #: The layer that gave each output, by its storage, and the outputs themselves, so that no other gets its place.
        self.outputs: dict[int, int] = {}
        self.held: list[torch.Tensor] = []
        #: The modules that took an output of each layer, and the other uses of it, in words.
        self.taken: dict[int, set[int]] = {}
        self.used: dict[int, dict[str, None]] = {}
        #: What went into each BatchNorm: layers, or None for anything else.
        self.flowed: dict[int, set[int | None]] = {}
        #: The layers of which something is not as torch's own layers do it.
        self.odd: dict[int, str] = {}
        self._running: list[nn.Module] = []
        self._convolved: dict[int, set[int]] = {}
        #: The layer of each weight, by its storage.
        self.weights: dict[int, int] = {}
        for key, layer in self.layers.items():
            weight = layer._parameters.get("weight")
            if weight is None or is_lazy(weight) or not has_storage(weight):
                continue
            if (other := self.weights.setdefault(key_of(weight), key)) != key:
                self.odd[key] = f"has a weight that {self.paths[other]} has too"
                self.odd[other] = f"has a weight that {self.paths[key]} has too"

    # --- while the pass runs ---

    def visit(self, module: nn.Module, _path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._running.append(module)
        if id(module) not in self.norms:
            return
        given = next(tensors_in([*args, *kwargs.values()]), None)
        layer = None if given is None or not has_storage(given) else self.outputs.get(key_of(given))
        self.flowed.setdefault(id(module), set()).add(layer)
        if layer is not None:
            self.taken.setdefault(layer, set()).add(id(module))

    def leave(self, module: nn.Module, _path: str, output: Any) -> None:
        while self._running and self._running.pop() is not module:
            pass  # a call that raised, and whose caller caught that
        if id(module) not in self.layers:
            return
        if not isinstance(output, torch.Tensor) or not has_storage(output):
            self.odd.setdefault(id(module), "gives something else than a tensor")
            return
        self._give(output, id(module))
        if isinstance(module, nn.Linear):
            if type(module).forward is not nn.Linear.forward:
                self.odd[id(module)] = "has a forward of its own"
        elif key_of(output) not in self._convolved.get(id(module), ()):
            self.odd[id(module)] = "has a forward that does more than a convolution"
        weight = module._parameters.get("weight")
        dimensions = 2 if isinstance(module, nn.Linear) or weight is None else weight.dim()
        if output.dim() != dimensions:
            self.odd[id(module)] = f"gives {output.dim()} dimensions, of which a BatchNorm normalises another one"

    def _give(self, output: torch.Tensor, layer: int) -> None:
        if self.outputs.setdefault(key_of(output), layer) == layer:
            self.held.append(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside = self._running[-1] if self._running else None
        is_convolution = func.overloadpacket is torch.ops.aten.convolution
        convolving = None
        for place, tensor in self._places(args, kwargs):
            layer = self.weights.get(key_of(tensor))
            if layer is not None:
                if inside is not self.layers[layer]:
                    self.odd[layer] = f"has a weight that {self._told(func, inside)} uses too"
                elif is_convolution and place == 1 and self._adds_bias(args, layer):
                    convolving = layer
                elif not isinstance(inside, nn.Linear):
                    self.odd[layer] = "has a forward that does more than a convolution"
            layer = self.outputs.get(key_of(tensor))
            if layer is not None and (inside is None or id(inside) not in self.taken.get(layer, ())):
                self.used.setdefault(layer, {}).setdefault(self._told(func, inside))
        result = func(*args, **kwargs)
        if convolving is not None:
            self._convolved.setdefault(convolving, set()).add(key_of(result))
            self._give(result, convolving)
        return result

    def _places(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[int, torch.Tensor]]:
        found = []
        for place, value in enumerate((*args, *kwargs.values())):
            found += [(place, tensor) for tensor in tensors_in(value) if not is_lazy(tensor) and has_storage(tensor)]
        return found

    def _adds_bias(self, args: Sequence[Any], layer: int) -> bool:
        bias = self.layers[layer]._parameters.get("bias")
        given = args[2] if len(args) > 2 else None
        return bias is not None and isinstance(given, torch.Tensor) and key_of(given) == key_of(bias)

    def _told(self, func: Any, inside: nn.Module | None) -> str:
        """Say where an operation is: `relu2`, or `add in layer1.0` for what a module with children does itself."""
        if inside is None:
            return f"{func.overloadpacket.__name__}"
        path = shown(self.paths.get(id(inside), ""))
        return f"{func.overloadpacket.__name__} in {path}" if inside._modules or path == "." else path

    # --- afterwards ---

    def finish(self, output: Any) -> None:
        """Note the outputs of layers that still exist, since something keeps them. `output` is that of the model."""
        results = {key_of(tensor) for tensor in tensors_in(output) if has_storage(tensor)}
        for key, layer in self.outputs.items():
            if key in results:
                self.used.setdefault(layer, {}).setdefault("the output of the model")
        kept = [(weakref.ref(tensor), self.outputs[key_of(tensor)]) for tensor in self.held]
        self.held.clear()
        self.outputs.clear()
        if any(reference() is not None for reference, _ in kept):
            gc.collect()
        for reference, layer in kept:
            if reference() is not None and not self.used.get(layer):
                self.used.setdefault(layer, {}).setdefault("something that keeps it after the forward pass")

    def flows(self, model: nn.Module) -> _Flows:
        """Return what the pass shows, for a model with the same paths."""
        paths = paths_of_modules(model)
        first = {name: group[0] for group in paths.values() for name in group}
        layers: dict[str, str] = {}
        reasons: dict[str, str] = {}
        refused: dict[str, str] = {}
        for key, given in self.flowed.items():
            norm, sources = first[self.paths[key]], [source for source in given if source is not None]
            if not sources:
                reasons[norm] = "what flows in is not the output of a convolution or linear layer"
                continue
            names = [first[self.paths[source]] for source in sources]
            refused[norm] = names[0]
            others = [self.paths[other] for other in self.taken[sources[0]] if other != key]
            if len(given) > 1:
                reasons[norm] = f"it is called several times, and not only on what {listed(names, 2)} gives"
            elif sources[0] in self.odd:
                reasons[norm] = f"{names[0]} {self.odd[sources[0]]}"
            elif others or sources[0] in self.used:
                elsewhere = listed([*others, *self.used.get(sources[0], ())], 2)
                reasons[norm] = f"what {names[0]} gives also goes into {elsewhere}"
            else:
                layers[norm] = names[0]
        return _Flows(layers, reasons, "the forward pass in eval mode does not call it", refused)


__all__ = ["Fold", "folds", "is_norm", "tensor_of"]

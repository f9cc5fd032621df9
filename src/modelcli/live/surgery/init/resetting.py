"""init by `default`: call the `reset_parameters` of the modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from modelcli.edits.init import Init
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.expressions import Call
from modelcli.live import signatures
from modelcli.live.meta_models import meta_copy
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.init.drawing import Drawing, kept_notes, literals
from modelcli.live.surgery.init.filling import ZEROS
from modelcli.live.surgery.schemes import DEFAULT
from modelcli.live.surgery.storages import has_storage
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors, lies_in, parent_of, shown


def refuse_arguments_of_default(edit: Init) -> None:
    if edit.scheme.args or edit.scheme.kwargs:
        raise RequestError(f"{edit.scheme}: default takes no arguments")
    if edit.bias != ZEROS:
        raise RequestError("default resets biases together with the weights, so it excludes --bias")


def drawing_by_reset(module: nn.Module, edit: Init, blueprint: Blueprint, names: Sequence[str]) -> Drawing:
    """Call `reset_parameters` on copies of the modules; the selected tensors get the values of the copies."""
    refuse_arguments_of_default(edit)
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
    # Copied now, because later edits of the model must not change what is drawn.
    frozen = meta_copy(originals, keep_values=True)
    pairs = {
        id(tensor): (tensor, frozen_tensor)
        for tensor, frozen_tensor in zip(named_tensors(originals).values(), named_tensors(frozen).values(), strict=True)
        if has_storage(tensor)
    }

    copied = [frozen_tensor for _, frozen_tensor in pairs.values()]

    def fill(real: Sequence[torch.Tensor]) -> None:
        made = {
            id(frozen_tensor): _like(frozen_tensor, tensor) for frozen_tensor, tensor in zip(copied, real, strict=True)
        }
        _reset(frozen, paths, made)

    first = {id(tensors[name]): name for name in reversed(names) if name in dense}
    filled = {name: DEFAULT for name in names if name in dense and first[id(tensors[name])] == name}
    picked = frozenset(names)
    excepted = [t.name for t in blueprint.tensors if t.name not in picked and lies_in(parent_of(t.name), paths)]
    line = str(Init(targets=literals(paths), scheme=Call(DEFAULT), without=literals(excepted)))
    kept = {
        name: "no module that holds it has reset_parameters"
        for name in names
        if name not in below and blueprint.by_name[name].kind == "parameter"
    } | {name: "reset_parameters does not reach through a parametrization" for name in names if name in hidden}
    return Drawing(
        filled,
        (DEFAULT,),
        [tensor for tensor, _ in pairs.values()],
        [frozen_tensor.detach() for frozen_tensor in copied],
        fill,
        (line,),
        kept_notes(kept),
        overwrites=False,
    )


def _holder(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(parent_of(name))


def _resettable(module: nn.Module, edit: Init, blueprint: Blueprint, names: Sequence[str]) -> dict[str, None]:
    """Return the paths, in order, of the modules to reset.

    Such a module contains a selected tensor, and a target picks it, a module above it, or one of its own tensors.
    """
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


def _like(frozen_tensor: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return a real tensor as a parameter if its copy on meta is one."""
    return (
        nn.Parameter(real, requires_grad=frozen_tensor.requires_grad)
        if isinstance(frozen_tensor, nn.Parameter)
        else real
    )


def _reset(frozen: nn.Module, paths: Iterable[str], made: Mapping[int, torch.Tensor]) -> None:
    """Call `reset_parameters` on copies of the modules.

    The copies have the real tensors `made`, given by the `id` of the tensor in `frozen`.
    """
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
            given[name].copy_(tensor)  # the module has replaced the tensor

"""fuse: fold BatchNorms into the convolutions and linear layers before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.declaring import MODULES, SELECTORS, Operand, option
from modelcli.edits.targets import OfTargets
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ROOT, lies_in, shown
from modelcli.wording import counted, listed


@dataclass(frozen=True, kw_only=True)
class Fuse(OfTargets):
    """Fold the BatchNorms at and below what matches into the convolution or linear layer before each.

    Which layer that is, a forward pass shows: its output goes into the BatchNorm and nowhere else. `into` says it
    instead, with a layer for each target: so a line of a record is carried out again where no input is known. Where
    one is known, the pass has to show the same.
    """

    into: tuple[str, ...] = option(
        "--into",
        SELECTORS,
        (),
        "The layer that a BatchNorm is folded into, once for each target: for a model whose input is not known.",
        metavar="LAYER",
        completes=(MODULES,),
    )

    name: ClassVar[str] = "fuse"
    summary: ClassVar[str] = "Fold BatchNorms into the convolution or linear layer before them, for inference."
    effect: ClassVar[str] = (
        "folds BatchNorms into the convolution or linear layer before them, with the arithmetic of "
        "`torch.nn.utils.fusion`: the model computes what it computed in eval mode. The layer gets the folded weight "
        "and a bias, the BatchNorm becomes `Identity`. A forward pass shows which layer it is; a BatchNorm whose layer "
        "is used elsewhere too stays, and a note says why"
    )
    in_pytorch: ClassVar[str] = "`fuse_conv_bn_eval(model.conv1, model.bn1)`"
    example: ClassVar[str] = "."
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli fuse . -m resnet18 -o folded.pth",
        "modelcli fuse '**:BatchNorm2d' --except layer4 -m resnet18",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors of BatchNorms, or of modules that contain some (. is the whole model).",
            "TARGET...",
            several=True,
            completes=(MODULES,),
            completes_later=(MODULES,),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("fold", "fold-bn", "fuse-bn", "merge-bn")
    handler: ClassVar[str] = "modelcli.live.surgery.fuse"


def picked_norms(edit: Fuse, blueprint: Blueprint, is_norm: Callable[[str], bool]) -> dict[str, str | None]:
    """Return the paths of the BatchNorms at and below what the selectors pick, in the model's order.

    Args:
        edit: the edit.
        blueprint: the model.
        is_norm: whether the module at a path is a BatchNorm.

    Returns:
        The path of the layer that the edit names for each BatchNorm; None where it names none.

    Raises RequestError if there are no BatchNorms, or not a layer for each where some are named.
    """
    picked = set(selectors.select_modules(blueprint, edit.targets))
    left = set(selectors.select_modules(blueprint, edit.without)) if edit.without else set[str]()
    paths = [module.path for module in blueprint.modules]
    norms = [path for path in paths if lies_in(path, picked) and not lies_in(path, left) and is_norm(path)]
    if edit.into:
        return _stated(edit, blueprint, norms)
    if norms:
        return dict.fromkeys(norms)
    targets = ", ".join("the model" if target == ROOT else target for target in edit.targets)
    elsewhere = [path for path in paths if is_norm(path)]
    if not elsewhere:
        rest = "" if ROOT in edit.targets else ", and neither has the rest of the model"
        raise RequestError(f"nothing to fuse: {targets} has no BatchNorm{rest}", "leave the edit out")
    raise RequestError(f"nothing to fuse: {targets} has no BatchNorm", f"fuse {selectors.literal(elsewhere[0])}")


def _stated(edit: Fuse, blueprint: Blueprint, norms: Sequence[str]) -> dict[str, str | None]:
    """Return the layer of each BatchNorm as `--into` says. Arguments, result and errors as in `picked_norms`."""
    one_each = "name one BatchNorm in each target, with one --into for each, in the same order"
    if len(edit.into) != len(edit.targets) or edit.without:
        raise RequestError(f"{counted(len(edit.targets), 'target')} and {len(edit.into)} --into", one_each)
    found: dict[str, str | None] = {}
    for target, layer in zip(edit.targets, edit.into, strict=True):
        path = selectors.select_one(blueprint, target, "fuse --into")
        if path not in norms:
            raise RequestError(f"{shown(path)} is no BatchNorm", one_each)
        found[path] = selectors.select_one(blueprint, layer, "--into")
    return found


def resolved_line(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the edit as a line without patterns, for the path of each BatchNorm and of its layer."""
    norms, layers = (tuple(map(selectors.literal, paths)) for paths in zip(*pairs, strict=True))
    return str(Fuse(targets=norms, into=layers))


def require_some(folded: Sequence[str], kept: Mapping[str, str], expect: int | None) -> None:
    """Raise RequestError if no BatchNorm can be folded, or another number than `--expect` says.

    Args:
        folded: the paths of those that can be folded.
        kept: why each of the others cannot.
        expect: the number of `--expect`, if any.
    """
    if not folded:
        raise RequestError(f"nothing to fuse: {'; '.join(_reasons(kept))}")
    selectors.require_expected(expect, folded, " BatchNorms")


def notes_on(folded: Sequence[str], kept: Mapping[str, str]) -> list[str]:
    """Return the notes on how many BatchNorms are folded, and why others are not. Arguments as in `require_some`."""
    into = "is folded into the layer before it" if len(folded) == 1 else "are folded into the layers before them"
    return [f"{counted(len(folded), 'BatchNorm')} {into}", *(f"not folded: {reason}" for reason in _reasons(kept))]


def _reasons(kept: Mapping[str, str]) -> list[str]:
    """Return one text for each reason, with the paths that it is for."""
    paths: dict[str, list[str]] = {}
    for path, reason in kept.items():
        paths.setdefault(reason, []).append(shown(path))
    return [f"{listed(names, 3)}: {reason}" for reason, names in paths.items()]

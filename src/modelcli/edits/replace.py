"""replace: replace modules with a new one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits.declaring import FLAG, MODULES, SELECTORS, Operand, choice, option
from modelcli.edits.kept_weights import WORDS
from modelcli.edits.picking import partly_picked
from modelcli.edits.placing import MODULE, place_and_module
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.language import expressions, selectors
from modelcli.language.expressions import Call
from modelcli.language.quoting import command
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors, parent_of


@dataclass(frozen=True, kw_only=True)
class Replace(Selecting):
    """Replace every match with a new module.

    `also` are further targets, such as the other names of a shared module. `keep_weights` copies the overlapping part
    of each tensor that means the same in both modules; `sum` and `mean` also carry the weights of a convolution over to
    another number of input channels, `repeat` fills larger tensors with the old values again and again, `interpolate`
    gives kernels and position embeddings another size. `untie` replaces a shared module only under the selected names,
    and unties tensors; `tie` gives the modules that share a tensor with the replaced one its new size.
    """

    target: str
    module: Call
    also: tuple[str, ...] = option(
        "--also",
        SELECTORS,
        (),
        "Take a shared module under these names as well.",
        metavar="SELECTOR",
        completes=(MODULES,),
    )
    keep_weights: str | None = option(
        "--keep-weights",
        choice(*WORDS),
        None,
        "Keep the old values of tensors that mean the same in both modules: where they overlap; summed or averaged "
        "over the input channels of a convolution; repeated along every axis but those of kernels; or interpolated: "
        "kernels of two dimensions and position embeddings.",
        metavar=f"[={'|'.join(WORDS)}]",
    )
    untie: bool = option("--untie", FLAG, False, "Replace a shared module only under the selected names.")
    tie: bool = option(
        "--tie", FLAG, False, "Give modules that share a tensor with the replaced one its new size; it stays shared."
    )

    name: ClassVar[str] = "replace"
    summary: ClassVar[str] = "Replace every match with a new module. _ keeps the old argument."
    effect: ClassVar[str] = (
        "replaces every match with a new module. `--keep-weights` keeps the old values of tensors that mean "
        "the same in both modules: the overlapping part, transposed for linear layers that store "
        "their weight the other way round. `=sum` carries a convolution over to other input channels as timm does: one "
        "new channel gets the sum over the old ones, several get them repeated and rescaled; `=mean` gives each new "
        "channel the mean. `=repeat` repeats the old values, without rescaling, along every axis that is larger now "
        "but those of kernels. `=interpolate` resamples kernels of two dimensions as timm's `resample_patch_embed` "
        "does, and position embeddings as `interpolate_embeddings` of vision transformers does: a square grid bicubic "
        "behind its class token, other embeddings linearly"
    )
    in_pytorch: ClassVar[str] = "`model.classifier[6] = nn.Linear(4096, 10)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli replace fc 'Linear(_,10)' -m resnet18 -o head10.pth",
        "modelcli replace '**:ReLU' GELU -m vgg16",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("target", "A selector of modules: classifier.6, '**:ReLU'.", completes=(MODULES,)),
        MODULE,
    )
    also_called: ClassVar[tuple[str, ...]] = ("swap", "change")
    handler: ClassVar[str] = "modelcli.live.surgery.replace"
    places_module: ClassVar[bool] = True
    replaces_module: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("replace takes a target and a module", "replace classifier.6 'Linear(4096,10)'")
        target, module = place_and_module(cls.name, "replace takes one target", words)
        return cls(target=target, module=module)

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the selectors of all modules to replace."""
        return (self.target, *self.also)

    def operands(self) -> list[str]:
        return [self.target, expressions.to_text(self.module)]


def replaced_paths(edit: Replace, blueprint: Blueprint) -> list[str]:
    """Return the paths of the modules to replace. Raises RequestError if one cannot be replaced."""
    paths = selectors.select_modules(blueprint, edit.targets, without=edit.without, expect=edit.expect)
    _refuse_expanded(edit, blueprint)
    if "" in paths:
        raise RequestError(
            "the model itself cannot be replaced by a module", "name that as the model: -m 'Linear(4096,10)'"
        )
    selectors.refuse_nested(paths, "to replace the outer one destroys the inner")
    return paths


def _refuse_expanded(edit: Replace, blueprint: Blueprint) -> None:
    """Explain that the shell has expanded a target: `replace classifier.{1,4} ReLU` arrives as two paths."""
    name = edit.module.name
    known = blueprint.by_path
    if name in known and "." in name:
        raise RequestError(
            f"{name} is a path of this model, not the name of a class",
            "the shell may have expanded a pattern: quote the target",
        )


@dataclass(frozen=True)
class Parting:
    """A tie that an edit breaks: the error without `--untie`, and the note with it.

    `is_of_tensors` says that a tensor is tied, and not a module replaced under some of its names.
    """

    message: str
    hint: str
    note: str
    is_of_tensors: bool = False


def partings(targets: Sequence[tuple[Sequence[str], Sequence[str]]], tied: Iterable[Sequence[str]]) -> list[Parting]:
    """Return the ties that replacing these modules breaks: modules with other names, and tied tensors.

    `targets` are the paths at which each is replaced, and all those that it has; `tied` the names of tensors that are
    one, or show some of the same bytes.
    """
    found = []
    for paths, everywhere in targets:
        if (part := partly_picked(paths, everywhere)) is not None:
            found.append(
                Parting(
                    part.message,
                    f"{command(part.also)} replaces it everywhere; --untie replaces it under the names picked alone",
                    f"{', '.join(paths)} and {', '.join(part.others)} are no longer one module",
                )
            )
    whole = {
        path: index
        for index, (paths, everywhere) in enumerate(targets)
        if len(paths) == len(everywhere)
        for path in paths
    }
    for group in tied:
        names: dict[int | None, str] = {}
        for name in group:
            index = next((whole[path] for path in ancestors(parent_of(name)) if path in whole), None)
            names.setdefault(index, name)
        replaced = [index for index in names if index is not None]
        if len(names) > 1 and replaced:
            name = names[replaced[0]]
            other = next(other for index, other in names.items() if index != replaced[0])
            found.append(
                Parting(
                    f"{name} is tied to {other}, and replacing {targets[replaced[0]][0][0]} unties them",
                    "--untie replaces it anyway: they become two separate tensors",
                    f"{name} and {other} are no longer tied",
                    is_of_tensors=True,
                )
            )
    return found


def settled_partings(edit: Replace, parted: Sequence[Parting], can_tie: Callable[[], bool]) -> list[str]:
    """Return the notes on the ties that an edit breaks because `--untie` says so.

    Args:
        edit: the edit.
        parted: the ties that it would break.
        can_tie: whether `--tie` would keep the tensors tied.

    Raises RequestError for a tie that neither `--untie` nor `--tie` settles.
    """
    if edit.tie and edit.untie:
        raise RequestError("--tie keeps tensors tied, and --untie unties them", "leave one of the two out")
    if edit.tie:
        parted = [part for part in parted if not part.is_of_tensors]
    if not parted or edit.untie:
        return [part.note for part in parted]
    first = parted[0]
    if first.is_of_tensors and can_tie():
        raise RequestError(first.message, f"--tie gives the other module the new size as well; {first.hint}")
    raise RequestError(first.message, first.hint)


def resolved_lines(edit: Replace, groups: Sequence[tuple[Sequence[str], Call]], keeps: Collection[str]) -> list[str]:
    """The edit as lines without patterns and holes: one for each module, under all the names that were picked.

    A module of which nothing is kept does not ask for it by itself: that is refused.
    """
    settled = replace(edit, without=(), expect=None)
    lines = []
    for paths, call in groups:
        first, *more = map(selectors.literal, paths)
        kept = edit.keep_weights if paths[0] in keeps else None
        lines.append(str(replace(settled, target=first, also=tuple(more), module=call, keep_weights=kept)))
    return lines

"""wrap: put a new module around modules that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits.declaring import CLASSES, MODULES, SELECTORS, Operand, option
from modelcli.edits.picking import partly_picked
from modelcli.edits.placing import place_and_module
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.language import expressions, selectors
from modelcli.language.expressions import Call
from modelcli.language.quoting import command
from modelcli.model.blueprint import Blueprint

_EXAMPLE = "wrap fc 'Sequential(_,Dropout(0.5))'"


@dataclass(frozen=True, kw_only=True)
class Wrap(Selecting):
    """Put what `module` makes of every match in its place; `_` stands for the old module with its weights.

    `also` are further targets, such as the other names of a shared module.
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

    name: ClassVar[str] = "wrap"
    summary: ClassVar[str] = "Wrap every match in a new module. _ is the old one with its weights."
    effect: ClassVar[str] = (
        "wraps every match in a new module, in which `_` is the old one with its weights: "
        "`Sequential(_,Dropout(0.5))`, `adapters:LoRALinear(_,r=8)`, "
        "`torch.nn.utils.parametrizations:weight_norm(_)`. Keys and frozen flags move along; `.` wraps the whole model"
    )
    in_pytorch: ClassVar[str] = "`model.fc = nn.Sequential(model.fc, nn.Dropout(0.5))`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli wrap fc 'Sequential(_,Dropout(0.5))' -m resnet18 -o out.pth",
        "modelcli wrap conv1 'torch.nn.utils.parametrizations:weight_norm(_)' -m resnet18",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("target", "A selector of modules: fc, '**:Linear', . for the model.", completes=(MODULES,)),
        Operand(
            "module",
            "A module with _ for the old one: Sequential(_,Dropout(0.5)).",
            "MODULE...",
            several=True,
            completes=(CLASSES,),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("parametrize", "lora", "surround")
    handler: ClassVar[str] = "modelcli.live.surgery.wrap"
    moves_paths: ClassVar[bool] = True
    places_module: ClassVar[bool] = True
    replaces_module: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("wrap takes a target and a module", _EXAMPLE)
        target, module = place_and_module(cls.name, "wrap takes one target", words)
        return cls(target=target, module=module)

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the selectors of all modules to wrap."""
        return (self.target, *self.also)

    def operands(self) -> list[str]:
        return [self.target, expressions.to_text(self.module)]


def wrapped_paths(edit: Wrap, blueprint: Blueprint) -> list[str]:
    """Return the paths of the modules to wrap.

    Raises RequestError if nothing matches, if a match is inside another one, and unless the module has one `_`.
    """
    holes = expressions.holes_in(edit.module)
    if holes == 0:
        raise RequestError(
            f"{edit.module} has no _, which is the place of the old module",
            f"{_EXAMPLE}; replace puts a module there without the old one",
        )
    if holes > 1:
        raise RequestError(
            f"{edit.module} has {holes} _, and the old module has one place", "write the other arguments out"
        )
    paths = selectors.select_modules(blueprint, edit.targets, without=edit.without, expect=edit.expect)
    selectors.refuse_nested(
        paths, hint="narrow the selector or take one away with --except; a second edit wraps the outer one"
    )
    return paths


def refuse_apart(paths: Sequence[str], everywhere: Sequence[str]) -> None:
    """Raise RequestError if a module is picked under some of its names only."""
    if (part := partly_picked(paths, everywhere)) is not None:
        raise RequestError(part.message, f"{command(part.also)} wraps it everywhere")


def resolved_lines(edit: Wrap, groups: Sequence[Sequence[str]]) -> list[str]:
    """Return the edit as lines without patterns: one for each module, under all the names that were picked."""
    settled = replace(edit, without=(), expect=None)
    lines = []
    for paths in groups:
        first, *more = map(selectors.literal, paths)
        lines.append(str(replace(settled, target=first, also=tuple(more))))
    return lines

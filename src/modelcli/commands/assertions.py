"""What `check` asserts of a model, and the result of one assertion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelcli.errors import RequestError, did_you_mean
from modelcli.model.dtypes import FLOATING
from modelcli.model.tensors import Shape


@dataclass(frozen=True)
class Assertions:
    """What is asserted of a model; None, empty and False stand for what is not.

    `max_params` and `max_bytes` are the most parameters, and the most bytes of parameters and buffers. `frozen`,
    `trainable`, `has` and `absent` are selectors. `dtypes` are those that floating-point tensors may have.
    `output_shapes` are shapes of what the forward pass gives. `same_as` are references, and `without` selectors of
    tensors that may differ from those. `complete` asserts that the files of a folder agree, and `arch_check` that its
    configuration builds the model that its tensors are of.
    """

    max_params: int | None = None
    max_bytes: int | None = None
    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    finite: bool = False
    safe: bool = False
    output_shapes: tuple[Shape, ...] = ()
    same_as: tuple[str, ...] = ()
    complete: bool = False
    arch_check: bool = False
    without: tuple[str, ...] = ()

    def require_sense(self) -> None:
        """Raise RequestError where nothing is asserted, or what is makes no sense."""
        if self.without and not self.same_as:
            raise RequestError(
                f"--except {self.without[0]} works only with --same-as", "add --same-as REFERENCE, or remove --except"
            )
        if self == Assertions(without=self.without):
            raise RequestError(
                "no assertion is given",
                "pass one, such as --max-params 60M, --frozen features or --finite; modelcli check --help lists all",
            )
        for name in self.dtypes:
            if name not in FLOATING:
                raise RequestError(f"{name!r} is not a floating-point dtype", did_you_mean(name, FLOATING))


@dataclass(frozen=True)
class AssertionResult:
    """Whether one assertion holds.

    Attributes:
        check: the assertion's option, without dashes: `max-params`.
        passed: whether it holds.
        found: what the model has: a number, a shape or words; why nothing could be found out, where that is so.
        wanted: what was asserted, likewise.
        answered: whether anything could be found out.
        on_record: set where only the file's record answers: why nothing else could be asked.
    """

    check: str
    passed: bool
    found: Any
    wanted: Any
    answered: bool = True
    on_record: str | None = None

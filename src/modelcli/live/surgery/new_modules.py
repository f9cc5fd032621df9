"""Make the new modules of an edit, on meta or with values, with the dtype and mode of the old ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modelcli.edits.applied import Context
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.language.expressions import Call
from modelcli.live import bounds, memory, modules
from modelcli.live.meta_models import build_on_meta, seeded
from modelcli.live.sources import Lazy, dtype_of, named_tensors, tag_drawn
from modelcli.live.surgery.core import is_meta, submodule
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.paths import ancestors, parent_of
from modelcli.model.state_dict import StateDictModel
from modelcli.providers.known_code import names_known_code


def maker(
    module: nn.Module,
    calls: Sequence[Call],
    context: Context,
    targets: Sequence[tuple[nn.Module, str]],
    *,
    on_meta_alone: bool = False,
) -> Callable[[], list[nn.Module]]:
    """Return a function that makes the new modules of one edit, all drawn from one generator, in order.

    With `on_meta_alone` they are made on the meta device even for a model with values.
    """
    # A dtype that the expression states is kept.
    own_dtype = any(expressions.gives(call, "dtype") for call in calls)
    placements = [placement_of(module, old, path, own_dtype=own_dtype) for old, path in targets]
    return maker_for_placements(
        placements, calls, context, [path for _, path in targets], on_meta_alone=on_meta_alone or is_meta(module)
    )


def maker_for_placements(
    placements: Sequence[Placement],
    calls: Sequence[Call],
    context: Context,
    paths: Sequence[str],
    *,
    on_meta_alone: bool,
) -> Callable[[], list[nn.Module]]:
    """Return a function that makes the new modules of one edit for these placements.

    With `on_meta_alone` the modules are made on the meta device, and their values are drawn when they are read. Raises
    RequestError for an expression that states a device.
    """
    refuse_device(calls)

    def placed(news: Sequence[nn.Module]) -> list[nn.Module]:
        return [placement.apply_to(new) for placement, new in zip(placements, news, strict=True)]

    def for_real() -> list[nn.Module]:
        with seeded(context.seed):
            made = [modules.make(call, trusted=context.trusted) for call in calls]
        return placed(made)

    def on_meta() -> list[nn.Module]:
        made = placed([_on_meta(call, path, context) for call, path in zip(calls, paths, strict=True)])
        memory.require(sum(map(memory.bytes_of, made)), str(calls[0]))
        holder = nn.ModuleList(made)
        tag_drawn(holder, Lazy(lambda: nn.ModuleList(for_real())))
        return made

    def in_two_steps() -> list[nn.Module]:
        on_meta()  # finds wrong arguments and sizes before anything is allocated
        return for_real()

    return on_meta if on_meta_alone else in_two_steps


def refuse_device(calls: Sequence[Call]) -> None:
    """Raise RequestError for an expression that states a device."""
    if any(expressions.gives(call, "device") for call in calls):
        raise RequestError(
            f"{calls[0]}: device has no place here, since a module goes where the model is", "leave device out"
        )


def _on_meta(call: Call, path: str, context: Context) -> nn.Module:
    """Make a new module on the meta device. Errors name its path."""
    try:
        held = bounds.as_typed(str(call)) if names_known_code(call) else None
        return build_on_meta(lambda: modules.make(call, trusted=context.trusted), only_if_needed=True, bounds=held)
    except RequestError as error:
        error.message = f"{path}: {error.message}"
        raise


@dataclass(frozen=True)
class Placement:
    """The properties of a new module: the mode of the old one, and the dtype and device of it or of nearby tensors."""

    training: bool
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def apply_to(self, new: nn.Module) -> nn.Module:
        """Give a new module these properties. One on meta, or inside a model on meta, stays on its device."""
        tensors = named_tensors(new).values()
        if self.dtype is not None and any(t.is_floating_point() and t.dtype != self.dtype for t in tensors):
            new = new.to(self.dtype)
        if self.device is not None and any(not t.is_meta for t in tensors):
            new = new.to(self.device)
        return new.train(self.training)


def placement_of(module: nn.Module, old: nn.Module, path: str, *, own_dtype: bool) -> Placement:
    """Return the placement of the module that replaces `old`: that of its first float tensor, or of a relative."""
    for above in ancestors(path):
        relative = submodule(module, above)
        for tensor in (*old.parameters(), *old.buffers(), *relative.parameters()):
            # A one-byte dtype (float8) of a relative does not count: it stores quantized weights, not new ones.
            if tensor.dtype.is_floating_point and (tensor.dtype.itemsize > 1 or above == path):
                device = None if tensor.is_meta else tensor.device
                return Placement(old.training, None if own_dtype else tensor.dtype, device)
    return Placement(old.training)


def new_for_keys(
    model: StateDictModel, calls: Sequence[Call], context: Context, targets: Sequence[tuple[bool, str]]
) -> list[nn.Module]:
    """Make the new modules of one edit of a state-dict model on the meta device. Their values are drawn when read.

    `targets` holds, for each module, whether it is in train mode, and its path.
    """
    own_dtype = any(expressions.gives(call, "dtype") for call in calls)
    dtypes = _Dtypes(model)
    placements = [Placement(mode, None if own_dtype else dtypes.at(path)) for mode, path in targets]
    return maker_for_placements(placements, calls, context, [path for _, path in targets], on_meta_alone=True)()


class _Dtypes:
    """The floating-point dtypes of a state-dict model, by the modules that have a parameter or a buffer of one."""

    def __init__(self, model: StateDictModel) -> None:
        self.own: dict[str, str] = {}
        self.wide: dict[str, str] = {}
        ordered = sorted(model.tensors.items(), key=lambda item: item[1].kind == "buffer")
        for name, tensor in ordered:
            if not tensor.dtype.startswith(("float", "bfloat")):
                continue
            for path in ancestors(parent_of(name)):
                self.own.setdefault(path, tensor.dtype)
                if tensor.kind == "parameter" and ITEM_BYTES[tensor.dtype] > 1:
                    self.wide.setdefault(path, tensor.dtype)

    def at(self, path: str) -> torch.dtype | None:
        """Return the dtype for a new module: that of the old module's first tensor, or of its nearest relative.

        A one-byte dtype (float8) of a relative does not count: it stores quantized weights, not new ones.
        """
        found = self.own.get(path) or next((self.wide[above] for above in ancestors(path) if above in self.wide), None)
        return None if found is None else dtype_of(found)

"""Notes on what a new module does not take over from the old one: settings, children, an own forward, hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn

from modelcli.errors import ModelcliError
from modelcli.language.expressions import Call
from modelcli.live import modules, signatures
from modelcli.live.meta_models import build_on_meta
from modelcli.live.surgery.settings import UNKNOWN, setting
from modelcli.wording import counted, listed

#: The most notes about different changes.
_MOST = 3
#: Arguments that need no note: those that the printed module shows because they determine a tensor's shape, and those
#: that do not influence values.
_NEED_NO_NOTE = {
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "num_features", "num_channels"),
    *("num_groups", "num_parameters", "normalized_shape", "num_embeddings", "embedding_dim", "input_size"),
    *("hidden_size", "embed_dim", "num_heads", "d_model", "nhead", "affine", "elementwise_affine"),
    *("track_running_stats", "inplace", "device", "dtype"),
}

#: A changed setting: its name, and the old and the new value as text; None if the new module has no such argument.
_Setting = tuple[str, str, str | None]


def notes(call: Call, resolved: Iterable[Call], replaced: Iterable[tuple[nn.Module, str, nn.Module]]) -> list[str]:
    """Return a note for each difference between new and old modules that the user did not write.

    Args:
        call: the expression that the user wrote.
        resolved: for each module, the expression with `_` filled in.
        replaced: the old modules, their paths, and the new modules.
    """
    replaced = list(replaced)
    settings: dict[tuple[_Setting, ...], list[str]] = {}
    lost: dict[tuple[str, str], list[str]] = {}
    for (old, path, new), made in zip(replaced, resolved, strict=True):
        if found := tuple(_settings_within(call, made, old, new)):
            settings.setdefault(found, []).append(path)
        if what := _lost_code(old, new):
            lost.setdefault((type(old).__name__, what), []).append(path)
    told = [f"{_where(where)}: {_changed(found)}" for found, where in list(settings.items())[:_MOST]]
    rest = sum(map(len, list(settings.values())[_MOST:]))
    told += [f"{rest} more have other settings than before"] if rest else []
    told += [f"{_where(where)}: the old {name} had {what}" for (name, what), where in list(lost.items())[:_MOST]]
    rest = sum(map(len, list(lost.values())[_MOST:]))
    return [*told, f"{rest} more had children, hooks or their own forward"] if rest else told


def _where(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _changed(settings: tuple[_Setting, ...]) -> str:
    """Return `stride was (2, 2) and is (1, 1) now: stride=_ keeps it`, and what the new class cannot have."""
    kept = [(name, was, now) for name, was, now in settings if now is not None]
    gone = [f"{name}={was}" for name, was, now in settings if now is None]
    parts = []
    if kept:
        changed = ", ".join(f"{name} was {was} and is {now} now" for name, was, now in kept)
        keeping = ", ".join(f"{name}=_" for name, _, _ in kept)
        parts.append(f"{changed}: {keeping} {'keeps it' if len(kept) == 1 else 'keep them'}")
    if gone:
        parts.append(f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} lost: the new module has no such argument")
    return "; ".join(parts)


# --- settings ------------------------------------------------------------------------------------------------------


def _settings_within(call: Call, made: Call, old: nn.Module, new: nn.Module) -> Iterator[_Setting]:
    """Yield the settings in which the new module, or a module of the old one's kind inside it, differs from the old."""
    if _akin(type(old), type(new)) or not _nested(call):
        yield from _settings(call, old, new)
        return
    for inner, inner_made in zip(_nested(call), _nested(made), strict=True):
        try:
            kind = modules.find_maker(inner.name, trusted=True)
            if isinstance(kind, type) and _akin(type(old), kind):
                module = build_on_meta(partial(modules.make, inner_made), only_if_needed=True)
                yield from _settings(inner, old, module)
                return
        except ModelcliError:
            continue


def _nested(call: Call) -> list[Call]:
    """Return the calls inside a call, outer ones first."""
    found: list[Call] = []
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Call):
            found += [value, *_nested(value)]
    return found


def _akin(one: type, other: type) -> bool:
    """Whether two classes have a base class in common besides `Module`: convolutions, norms, dropouts."""
    shared = set(one.__mro__) & set(other.__mro__)
    return any(issubclass(kind, nn.Module) and kind is not nn.Module for kind in shared)


def _settings(call: Call, old: nn.Module, new: nn.Module) -> Iterator[_Setting]:
    """Yield the old module's settings that the expression does not state and that the new module changes or lacks."""
    taken = modules.parameter_names(type(new))
    written = {*taken[: len(call.args)], *call.kwargs}
    defaults = _defaults(type(old))
    for name in modules.parameter_names(type(old)):
        was = setting(old, name)
        if was is UNKNOWN or name in written:
            continue
        if name in taken:
            now = setting(new, name)
            if now is not UNKNOWN and _differ(was, now):
                yield name, str(was), str(now)
        elif name not in _NEED_NO_NOTE and name in defaults and _differ(was, defaults[name]) and not _nested(call):
            yield name, str(was), None


def _defaults(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the defaults of a constructor's arguments."""
    for base in kind.__mro__:
        parameters = signatures.of(base).parameters.values()
        if [parameter.name for parameter in parameters][:1] != ["args"]:
            return {p.name: p.default for p in parameters if p.default is not p.empty}
    return {}


def _differ(was: Any, now: Any) -> bool:
    """Whether two settings differ; 2 equals (2, 2)."""
    if isinstance(was, tuple) != isinstance(now, tuple) and was is not None and now is not None:
        several, one = (was, now) if isinstance(was, tuple) else (now, was)
        return any(value != one for value in several)
    return bool(was != now)


# --- code ------------------------------------------------------------------------------------------------------------


def _lost_code(old: nn.Module, new: nn.Module) -> str | None:
    """Return what the old module ran that the new one does not: children, an own forward, hooks; None if nothing."""
    children = [f"{name} {type(child).__name__}" for name, child in old.named_children()]
    parts = []
    if children and list(old._modules) != list(new._modules):
        parts.append(f"{counted(len(children), 'child', 'children')} ({listed(children, 3)})")
    own: Any = type(old).forward
    if own is not type(new).forward and not (own.__module__ or "").startswith("torch.nn."):
        parts.append("its own forward")
    if hooks := len(old._forward_hooks) + len(old._forward_pre_hooks):
        parts.append(counted(hooks, "hook"))
    return f"{' and '.join(parts)}, which the new one does not have" if parts else None

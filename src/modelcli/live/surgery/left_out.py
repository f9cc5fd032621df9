"""What a new module does not take over of the old one, because the expression leaves it out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from modelcli.expressions import Call
from modelcli.live import modules
from modelcli.live.surgery.making import attribute

#: Lines about modules that differ in different ways.
_MOST = 3


def notes(call: Call, replaced: Iterable[tuple[nn.Module, str, nn.Module]]) -> list[str]:
    """A line for each way in which modules differ from the old ones that nobody wrote: a stride of 2, say, that is 1
    now. `call` is the expression as it was given, and `replaced` the old modules, their paths, the new.
    """
    paths: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
    for old, path, new in replaced:
        if settings := _settings(call, old, new):
            paths.setdefault(settings, []).append(path)
    told = []
    for settings, where in list(paths.items())[:_MOST]:
        place = where[0] if len(where) == 1 else f"{where[0]} and {len(where) - 1} more"
        changed = ", ".join(f"{name} was {was} and is {now} now" for name, was, now in settings)
        keeping = ", ".join(f"{name}=_" for name, _, _ in settings)
        told.append(f"{place}: {changed}: {keeping} {'keeps it' if len(settings) == 1 else 'keep them'}")
    rest = sum(map(len, list(paths.values())[_MOST:]))
    return [*told, f"{rest} more have settings other than before"] if rest else told


def _settings(call: Call, old: nn.Module, new: nn.Module) -> tuple[tuple[str, str, str], ...]:
    """The arguments that both classes have, the expression leaves out, and that differ: name, old and new value."""
    had = modules.parameter_names(type(old))
    names = [name for name in modules.parameter_names(type(new))[len(call.args) :] if name in had]
    values = [(name, attribute(old, name), attribute(new, name)) for name in names if name not in call.kwargs]
    return tuple((name, str(was), str(now)) for name, was, now in values if _differ(was, now))


def _differ(was: Any, now: Any) -> bool:
    """Whether two values that are known are not the same; 2 is (2, 2)."""
    if was is None or now is None:
        return False
    if isinstance(was, tuple) != isinstance(now, tuple):
        several, one = (was, now) if isinstance(was, tuple) else (now, was)
        return any(value != one for value in several)
    return bool(was != now)

"""Plug-ins: the entry points that other packages register, and which package raised an exception.

This module loads the objects of entry points. The registries (`edits.registry`, `checkpoints.formats`, `providers`)
check them; this module does not know what an edit, a format or a provider is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from modelcli.errors import SystemFailureError

#: The groups of entry points, each with the word for its entry points in messages.
EDITS, FORMATS, PROVIDERS = "modelcli.edits", "modelcli.formats", "modelcli.providers"
KINDS: Mapping[str, str] = {EDITS: "edit", FORMATS: "format", PROVIDERS: "provider"}


@dataclass(frozen=True, order=True)
class PlugIn:
    """An entry point that another package registers.

    Attributes:
        name: the name of the entry point.
        value: the object that it names: `package.module:Class`.
        group: the group of the entry point.
        package: the name of the installed package; None if it is unknown.
        version: the version of the package.
    """

    name: str
    value: str
    group: str
    package: str | None = None
    version: str | None = None

    @property
    def owner(self) -> str:
        """The package with its version, for messages: `modelcli-plugin 1.0`."""
        return "an unknown package" if self.package is None else f"{self.package} {self.version}"

    @property
    def title(self) -> str:
        """The plug-in and its package, for messages: `the edit clamp of modelcli-plugin 1.0`."""
        return f"the {KINDS[self.group]} {self.name} of {self.owner}"

    @property
    def hint(self) -> str:
        """The hint for a plug-in that cannot be used."""
        return f"fix or uninstall {self.package or 'the package'}, which registers {self.name} as {self.value}"

    def load(self) -> Any:
        """Return the object that the entry point names. Raises SystemFailureError if its module cannot be imported."""
        from importlib.metadata import EntryPoint

        try:
            return EntryPoint(self.name, self.value, self.group).load()
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            raise self.unusable(f"cannot be loaded: {type(error).__name__}: {error}") from error

    def unusable(self, why: str) -> SystemFailureError:
        """Return the error for a plug-in that cannot be used. `why` continues the sentence after its title."""
        return SystemFailureError(f"{self.title} {why}", self.hint)

    def require_texts(self, found: object, *names: str) -> None:
        """Raise SystemFailureError if the loaded object lacks one of these attributes, or if one is not text."""
        for name in names:
            if not isinstance(value := getattr(found, name, None), str) or not value:
                raise self.unusable(f"declares no {name}" if value is None else f"declares {value!r} as its {name}")

    def require_tuples(self, found: object, *names: str, of: type = str) -> None:
        """Raise SystemFailureError if one of these attributes is not a tuple of values of type `of`."""
        for name in names:
            value = getattr(found, name, None)
            if not isinstance(value, tuple) or not all(isinstance(item, of) for item in value):
                what = "texts" if of is str else f"{of.__name__}s"
                raise self.unusable(f"declares {value!r} as its {name}, which has to be a tuple of {what}")


@functools.cache
def registered(group: str) -> Mapping[str, tuple[PlugIn, ...]]:
    """Return what other packages register in a group, by name, without importing them."""
    from importlib.metadata import entry_points  # importing this takes as long as showing a file

    found: dict[str, list[PlugIn]] = {}
    for entry in entry_points(group=group):
        dist = entry.dist
        package, version = (None, None) if dist is None else (dist.name, dist.version)
        found.setdefault(entry.name, []).append(PlugIn(entry.name, entry.value, group, package, version))
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def find(group: str, name: str) -> PlugIn | None:
    """Return what a package registers under a name; None if no package does.

    Raises:
        SystemFailureError: several packages register the name, so the result would depend on their order.
    """
    found = registered(group).get(name, ())
    if len(found) > 1:
        owners = " and ".join(plug_in.owner for plug_in in found)
        raise SystemFailureError(
            f"the {KINDS[group]} {name} is registered by {owners}", "uninstall all but one of them"
        )
    return found[0] if found else None


def forget() -> None:
    """Forget the entry points, so that they are read again: a package may have been installed or removed."""
    registered.cache_clear()


def at_fault(error: BaseException) -> str | None:
    """Return the plug-in's package, with its version, that raised an exception; None if no plug-in's code did."""
    modules = [module for frame in _frames(error.__traceback__) for module in frame]
    owners = _owners() if modules else {}
    for module in reversed(modules):
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            if (owner := owners.get(".".join(parts[:end]))) is not None:
                return owner
    return None


def _frames(trace: TracebackType | None) -> Iterator[tuple[str, ...]]:
    """Yield, for each frame, the module of its code and that of the class of `self`, which may inherit the method."""
    while trace is not None:
        names = trace.tb_frame.f_locals
        owner = names.get("self", names.get("cls"))
        kind = owner if isinstance(owner, type) else type(owner)
        found = (kind.__module__, trace.tb_frame.f_globals.get("__name__"))
        yield tuple(name for name in found if isinstance(name, str) and name.partition(".")[0] not in _NOT_ASKED)
        trace = trace.tb_next


#: Packages that contain no plug-in. If a traceback has only these, no entry points are read.
_NOT_ASKED = frozenset({"modelcli", "typer", "builtins", "__main__"}) | sys.stdlib_module_names


def _owners() -> dict[str, str]:
    """Return the packages with plug-ins, with their versions, by the Python package or module of their code."""
    found = {}
    for group in KINDS:
        for plug_ins in registered(group).values():
            for plug_in in plug_ins:
                module = plug_in.value.partition(":")[0].strip()
                found[module.rpartition(".")[0] or module] = plug_in.owner
    return found

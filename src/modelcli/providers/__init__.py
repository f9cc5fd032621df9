"""The registry of providers: one line for each, which is imported when it is first used.

Other packages register a provider in the entry point group `modelcli.providers`; the name of the entry point is the
prefix of its references. Entry points are read when a prefix, or the package of a class, belongs to no built-in
provider, and by `list`, `identify` and `--help`, which need all providers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from modelcli import installed
from modelcli.errors import ModelcliError
from modelcli.providers.base import Provider

if TYPE_CHECKING:
    from modelcli.plug_ins import PlugIn

#: The built-in providers whose models need no prefix. A name belongs to the first that accepts it; torch.nn, the last
#: one, accepts every name as a module expression.
_BY_BARE_NAMES = (
    "modelcli.providers.torchvision",
    "modelcli.providers.torch_nn",
    "modelcli.providers.python_objects",
)
#: The built-in providers with a prefix, by prefix.
_BY_PREFIX: Mapping[str, str] = {
    "hf": "modelcli.providers.huggingface",
    "timm": "modelcli.providers.timm",
}


@functools.cache
def built_in() -> tuple[Provider, ...]:
    """Return the built-in providers whose models need no prefix."""
    return tuple(map(_provider_in, _BY_BARE_NAMES))


def _provider_in(module: str) -> Provider:
    found: Provider = importlib.import_module(module).PROVIDER
    return found


#: The providers with a prefix that were loaded, by prefix.
_LOADED: dict[str, Provider] = {}


def by_prefix(prefix: str) -> Provider | None:
    """Return the provider with this prefix: a built-in one, else that of another package, else None.

    Raises:
        SystemFailureError: the other package cannot be used, or several packages register the prefix.
    """
    if prefix in _LOADED:
        return _LOADED[prefix]
    if (module := _BY_PREFIX.get(prefix)) is not None:
        found = _provider_in(module)
    else:
        from modelcli import plug_ins as packages_of_others

        if (plug_in := packages_of_others.find(packages_of_others.PROVIDERS, prefix)) is None:
            return None
        found = _provider_of(plug_in)
    return _LOADED.setdefault(prefix, found)


def plug_ins() -> list[str]:
    """Return the prefixes that other packages register, without importing the packages."""
    from modelcli import plug_ins as packages_of_others

    return [
        prefix for prefix in packages_of_others.registered(packages_of_others.PROVIDERS) if prefix not in _BY_PREFIX
    ]


def _provider_of(plug_in: PlugIn) -> Provider:
    """Return the provider of another package. Raises SystemFailureError if its declaration is incomplete."""
    found = plug_in.load()
    try:
        if isinstance(found, type):
            found = found()
    except Exception as error:
        raise plug_in.unusable(f"cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(found, Provider):
        raise plug_in.unusable(f"cannot be used: {plug_in.value} is no subclass of modelcli.providers.base.Provider")
    if found.prefix != plug_in.name:
        raise plug_in.unusable(f"cannot be used: {plug_in.value} calls its prefix {found.prefix}")
    plug_in.require_texts(found, "name", "live")
    plug_in.require_tuples(found, "packages")
    return found


class Everything(NamedTuple):
    """All installed providers, and the errors of those that cannot be loaded."""

    providers: tuple[Provider, ...]
    problems: tuple[str, ...] = ()


def everything() -> Everything:
    """Load every provider: the built-in ones and those of other packages."""
    found, problems = list(built_in()), []
    for prefix in (*_BY_PREFIX, *plug_ins()):
        try:
            provider = by_prefix(prefix)
        except ModelcliError as error:
            problems.append(error.message)
            continue
        if provider is not None:
            found.append(provider)
    return Everything(tuple(found), tuple(problems))


def loaded() -> list[Provider]:
    """Return the providers with a prefix that this process has loaded."""
    return list(_LOADED.values())


def with_prefix() -> list[Provider]:
    """Return the built-in providers with a prefix, and those of other packages that are already loaded."""
    return [*(_provider_in(module) for module in _BY_PREFIX.values()), *loaded()]


def forget() -> None:
    """Forget the providers of other packages, so that entry points are read again."""
    _LOADED.clear()
    from modelcli import plug_ins as packages_of_others

    owner.cache_clear()
    packages_of_others.forget()


def prefixes() -> list[str]:
    """Return all prefixes of references, without importing any provider."""
    return [*_BY_PREFIX, *plug_ins()]


@functools.cache
def owner(package: str) -> Provider | None:
    """Return the provider whose library a package belongs to, so that a file may name the module classes in it.

    The providers of other packages are loaded if no built-in provider owns the package. None if no provider owns it.
    """
    for provider in built_in():
        if provider.owns(package):
            return provider
    others = everything().providers[len(built_in()) :]
    return next((provider for provider in others if provider.owns(package)), None)


def packages() -> tuple[str, ...]:
    """Return the names of the installed packages of the built-in providers, each once."""
    return tuple(dict.fromkeys(package for provider in built_in() for package in provider.packages))


def packages_of_extras() -> tuple[str, ...]:
    """The same of the built-in providers with a prefix, whose libraries extras of modelcli install."""
    extras = map(_provider_in, _BY_PREFIX.values())
    return tuple(dict.fromkeys(package for provider in extras for package in provider.packages))


def with_names() -> str:
    """Return a list of the built-in providers whose models and weights have names, for messages."""
    return " or ".join(provider.name for provider in built_in() if provider.has_names)


def names() -> list[str]:
    """Return the names of all models that need no prefix."""
    return [name for provider in built_in() for name in provider.names()]


def names_after(prefix: str) -> list[str]:
    """Return the models of the provider with this prefix as references; none if there is no such provider."""
    provider = by_prefix(prefix)
    return [] if provider is None else [f"{prefix}:{name}" for name in provider.names()]


def full_names_after(prefix: str) -> list[str]:
    """Return the completions of this prefix as references: see `Provider.full_names`."""
    provider = by_prefix(prefix)
    return [] if provider is None else [f"{prefix}:{name}" for name in provider.full_names()]


def prefix_of(model: str) -> str | None:
    """Return the prefix of a reference: `timm` for `timm:resnet50(num_classes=3)`, None for `resnet50`."""
    prefix, colon, _ = model.partition("(")[0].partition(":")
    return prefix if colon else None


def versions_of(prefix: str | None) -> dict[str, str | None]:
    """Return the versions of the packages that decide what is built: those of built-in providers and of this prefix."""
    provider = None if prefix is None else by_prefix(prefix)
    of_provider = () if provider is None else provider.packages
    return {package: installed.version(package) for package in dict.fromkeys((*packages(), *of_provider))}


def class_packages() -> str:
    """Return the packages whose module classes need no package in an expression, for messages: `torch.nn or ...`."""
    named = sorted(built_in(), key=lambda provider: not provider.owns(""))
    return " or ".join(provider.classes_from for provider in named if provider.classes_from is not None)


def class_names() -> list[str]:
    """Return the module classes of built-in providers that expressions may write without a package."""
    return [name for provider in built_in() for name in provider.class_names()]


def titles() -> list[str]:
    """Return the kinds of models of the built-in providers, for `--help`."""
    return [provider.title for provider in built_in() if provider.title]

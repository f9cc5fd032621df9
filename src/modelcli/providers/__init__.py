"""The registry of providers: one line each, imported when it is asked for.

Other packages register one by the entry point group `modelcli.providers`: the name of the entry point is the prefix of
its references. Entry points are read when a prefix, or the package of a class, belongs to no built-in provider, and
where all models are asked for: by `list`, `identify` and `--help`.
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

#: The built-in providers whose models go by bare names. The first one that takes a name has it; expressions of torch.nn
#: take every name.
_BY_BARE_NAMES = (
    "modelcli.providers.torchvision",
    "modelcli.providers.torch_nn",
    "modelcli.providers.python_objects",
)
#: The built-in providers whose models have a prefix, by it.
_BY_PREFIX: Mapping[str, str] = {
    "hf": "modelcli.providers.huggingface",
    "timm": "modelcli.providers.timm",
}


@functools.cache
def built_in() -> tuple[Provider, ...]:
    """The providers whose models go by bare names."""
    return tuple(map(_provider_in, _BY_BARE_NAMES))


def _provider_in(module: str) -> Provider:
    found: Provider = importlib.import_module(module).PROVIDER
    return found


#: Those with a prefix that were asked for, by it.
_LOADED: dict[str, Provider] = {}


def by_prefix(prefix: str) -> Provider | None:
    """The provider whose references begin with `prefix` and a colon: a built-in one, else that of another package.

    Raises SystemFailureError where that package cannot be used, or where several packages have the prefix.
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
    """The prefixes that other packages register; nothing is imported for it."""
    from modelcli import plug_ins as packages_of_others

    return [
        prefix for prefix in packages_of_others.registered(packages_of_others.PROVIDERS) if prefix not in _BY_PREFIX
    ]


def _provider_of(plug_in: PlugIn) -> Provider:
    """The provider of another package. Raises SystemFailureError for what is no whole declaration of one."""
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
    """All providers that are installed, and what is wrong with those that cannot be loaded."""

    providers: tuple[Provider, ...]
    problems: tuple[str, ...] = ()


def everything() -> Everything:
    """Every provider: those that come with modelcli, and those of other packages."""
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
    """The providers with a prefix whose models this process has named."""
    return list(_LOADED.values())


def with_prefix() -> list[Provider]:
    """The built-in providers with a prefix, and those of other packages that were named already."""
    return [*(_provider_in(module) for module in _BY_PREFIX.values()), *loaded()]


def forget() -> None:
    """Forget which providers other packages have, so that they are looked for again."""
    _LOADED.clear()
    from modelcli import plug_ins as packages_of_others

    owner.cache_clear()
    packages_of_others.forget()


def prefixes() -> list[str]:
    """The prefixes that references may have; no provider is imported for it."""
    return [*_BY_PREFIX, *plug_ins()]


@functools.cache
def owner(package: str) -> Provider | None:
    """The provider whose library a package belongs to, so that a file may name the module classes in it; or None.

    Other packages' providers are asked where no built-in one owns it.
    """
    for provider in built_in():
        if provider.owns(package):
            return provider
    others = everything().providers[len(built_in()) :]
    return next((provider for provider in others if provider.owns(package)), None)


def packages() -> tuple[str, ...]:
    """The names under which the libraries of the built-in providers are installed, each once."""
    return tuple(dict.fromkeys(package for provider in built_in() for package in provider.packages))


def packages_of_extras() -> tuple[str, ...]:
    """The same of the built-in providers with a prefix, whose libraries extras of modelcli install."""
    extras = map(_provider_in, _BY_PREFIX.values())
    return tuple(dict.fromkeys(package for provider in extras for package in provider.packages))


def with_names() -> str:
    """The built-in providers whose models have names, and weights by name, for messages."""
    return " or ".join(provider.name for provider in built_in() if provider.has_names)


def names() -> list[str]:
    """The names of models that need no prefix."""
    return [name for provider in built_in() for name in provider.names()]


def names_after(prefix: str) -> list[str]:
    """The models of the provider with this prefix, as references; none where there is no such provider."""
    provider = by_prefix(prefix)
    return [] if provider is None else [f"{prefix}:{name}" for name in provider.names()]


def full_names_after(prefix: str) -> list[str]:
    """What completion offers behind this prefix, as references: see `Provider.full_names`."""
    provider = by_prefix(prefix)
    return [] if provider is None else [f"{prefix}:{name}" for name in provider.full_names()]


def prefix_of(model: str) -> str | None:
    """The prefix of a reference as text: `timm` of `timm:resnet50(num_classes=3)`, None of `resnet50`."""
    prefix, colon, _ = model.partition("(")[0].partition(":")
    return prefix if colon else None


def versions_of(prefix: str | None) -> dict[str, str | None]:
    """The versions of the libraries that decide what a provider builds: the built-in ones', and those of a prefix's."""
    provider = None if prefix is None else by_prefix(prefix)
    of_provider = () if provider is None else provider.packages
    return {package: installed.version(package) for package in dict.fromkeys((*packages(), *of_provider))}


def class_packages() -> str:
    """Where bare names of module classes are looked for, for messages: `torch.nn or ...`."""
    named = sorted(built_in(), key=lambda provider: not provider.owns(""))
    return " or ".join(provider.classes_from for provider in named if provider.classes_from is not None)


def class_names() -> list[str]:
    """The module classes that expressions may name by their bare names, without those of other packages."""
    return [name for provider in built_in() for name in provider.class_names()]


def titles() -> list[str]:
    """What models the built-in providers know, for `--help`."""
    return [provider.title for provider in built_in() if provider.title]

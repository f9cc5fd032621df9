"""Find the torch halves of the providers, by the dotted names in their declarations."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from modelcli import plug_ins, providers
from modelcli.errors import ModelcliError, SystemFailureError
from modelcli.language.references import CheckpointFile, NamedModel, Reference
from modelcli.providers.base import Provider

if TYPE_CHECKING:
    from torch import nn

    from modelcli.live.providers.base import ClassLayers, LiveProvider
    from modelcli.live.resizing import Resizing


@functools.cache
def half_of(provider: Provider) -> LiveProvider:
    """Import and return the torch half of a provider, which imports its library later.

    Raises SystemFailureError if that of another package cannot be imported or does not exist.
    """
    module, _, name = provider.live.partition(":")
    with blamed(provider):
        kind = getattr(importlib.import_module(module), name, None)
        if not isinstance(kind, type):
            what = f"names {provider.live} as its torch half, which is no class"
            plug_in = _plug_in(provider)
            raise SystemFailureError(f"{provider.name} {what}") if plug_in is None else plug_in.unusable(what)
        found: LiveProvider = kind(provider)
        return found


def _plug_in(provider: Provider) -> plug_ins.PlugIn | None:
    """What another package registered the provider as; None for one of modelcli's own."""
    prefix = provider.prefix
    return plug_ins.find(plug_ins.PROVIDERS, prefix) if prefix in providers.plug_ins() and prefix else None


@contextlib.contextmanager
def blamed(provider: Provider) -> Iterator[None]:
    """Turn an exception of another package's provider into a SystemFailureError that names the provider."""
    try:
        yield
    except (ModelcliError, MemoryError):
        raise
    except Exception as error:
        if (plug_in := _plug_in(provider)) is None:
            raise
        raise plug_in.unusable(f"failed: {type(error).__name__}: {error}") from error


def provider_of(reference: Reference) -> LiveProvider:
    """Return the provider of a reference: that of its prefix, else the first built-in one that accepts it."""
    assert not isinstance(reference, CheckpointFile)
    if isinstance(reference, NamedModel) and reference.prefix is not None:
        provider = providers.by_prefix(reference.prefix)
        assert provider is not None, f"{reference} was parsed with a prefix that is registered"
        return half_of(provider)
    return next(half for half in built_in() if half.takes(reference))


def built_in() -> Iterator[LiveProvider]:
    """Return the torch halves of the built-in providers, in the order of the registry."""
    return map(half_of, providers.built_in())


def in_use() -> Iterator[LiveProvider]:
    """Return the torch halves that may be used: the built-in ones, and those of other packages that were named."""
    yield from built_in()
    yield from map(half_of, providers.loaded())


def with_classes() -> Iterator[LiveProvider]:
    """Return the built-in torch halves with module classes that need no package, in the order of the look-up."""
    return map(half_of, sorted(filter(_has_classes, providers.built_in()), key=lambda provider: not provider.owns("")))


def _has_classes(provider: Provider) -> bool:
    return provider.classes_from is not None


def why_not_resized(module: nn.Module, what: str, size: int) -> str | None:
    """Why the library of a model cannot resize it: see `LiveProvider.why_not_resized`."""
    return next((why for half in in_use() if (why := half.why_not_resized(module, what, size)) is not None), None)


def resizing_of(module: nn.Module, what: str, size: int) -> Resizing | None:
    """Return how the first provider that knows a model resizes it: see `LiveProvider.resizing`."""
    return next((found for half in in_use() if (found := half.resizing(module, what, size)) is not None), None)


def class_layers_of(module: nn.Module, number: int) -> ClassLayers | None:
    """Return what the first provider that knows a model says decides its classes: see `LiveProvider.class_layers`."""
    return next((found for half in in_use() if (found := half.class_layers(module, number)) is not None), None)


def further_inputs_of(module: nn.Module) -> Collection[str] | None:
    """Return what the `**kwargs` of a module's `forward` may be: see `LiveProvider.further_inputs`."""
    return next((found for half in in_use() if (found := half.further_inputs(module)) is not None), None)

"""Decide whether a name means code of an installed, known library. Files may only name such code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcli import providers
from modelcli.language.references import NamedModel

if TYPE_CHECKING:
    from modelcli.language.expressions import Call


def is_known_name(dotted: str) -> bool:
    """Whether a dotted name is that of a class or function of a provider's library: `Linear`, `torch.nn:Linear`.

    Looking such a name up imports nothing except the library.
    """
    package, _, name = dotted.replace(":", ".").rpartition(".")
    return bool(name) and providers.owner(package) is not None


def runs_known_code(reference: NamedModel) -> bool:
    """Whether building a model runs only code of known libraries, and none of a user's."""
    from modelcli.language import expressions

    named = expressions.names_in(reference.call)
    if reference.prefix is not None:
        provider = providers.by_prefix(reference.prefix)
        if provider is None or not provider.is_known_code(next(named)):
            return False
    return all(map(is_known_name, named))


def has_known_arguments(reference: NamedModel) -> bool:
    """Whether the arguments of a reference name only classes of known libraries."""
    from modelcli.language import expressions

    _, *named = expressions.names_in(reference.call)
    return all(map(is_known_name, named))


def names_known_code(call: Call) -> bool:
    """Whether a module expression names only classes of known libraries, in its arguments as well."""
    from modelcli.language import expressions

    return all(map(is_known_name, expressions.names_in(call)))

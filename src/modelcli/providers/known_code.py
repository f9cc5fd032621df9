"""Whether a name stands for code of an installed, known library: only such a name is followed for a file's sake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcli import providers
from modelcli.language.references import NamedModel

if TYPE_CHECKING:
    from modelcli.language.expressions import Call


def is_known_name(dotted: str) -> bool:
    """Whether a dotted name is one that a provider's library has by that name: `Linear`, `torch.nn:Linear`.

    Such a name is looked up in what is loaded, and imports nothing else.
    """
    package, _, name = dotted.replace(":", ".").rpartition(".")
    return bool(name) and providers.owner(package) is not None


def runs_known_code(reference: NamedModel) -> bool:
    """Whether to build a model runs nothing but code of known libraries: no code of the user's decides what it is."""
    from modelcli.language import expressions

    named = expressions.names_in(reference.call)
    if reference.prefix is not None:
        provider = providers.by_prefix(reference.prefix)
        if provider is None or not provider.is_known_code(next(named)):
            return False
    return all(map(is_known_name, named))


def has_known_arguments(reference: NamedModel) -> bool:
    """Whether the arguments of a reference name nothing but classes of known libraries."""
    from modelcli.language import expressions

    _, *named = expressions.names_in(reference.call)
    return all(map(is_known_name, named))


def names_known_code(call: Call) -> bool:
    """The same of a module expression."""
    from modelcli.language import expressions

    return all(map(is_known_name, expressions.names_in(call)))

"""Decide which objects beside a state dict modelcli copies when it edits a file: values of standard types.

Nothing is loaded. modelcli writes a copied object as the same calls again, so the result is neither safer nor more
dangerous than the file was. It copies only objects that are known to be plain values, and refuses all others.
"""

from __future__ import annotations

import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable
from typing import Any

from modelcli import providers
from modelcli.checkpoints import limits
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef

#: The classes and functions that only make a value from their arguments.
_STANDARD = frozenset(
    {
        *(
            f"numpy.{package}.{name}"
            for package in ("core", "_core")
            for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
        ),
        *("numpy.dtype", "numpy.ndarray", "numpy.random._pickle.__randomstate_ctor"),
        *("numpy.random._pickle.__generator_ctor", "numpy.random._pickle.__bit_generator_ctor"),
        *(f"numpy.random._{name.lower()}.{name}" for name in ("MT19937", "PCG64", "Philox", "SFC64")),
        *(
            f"{module}.{prefix}{system}Path"
            for module in ("pathlib", "pathlib._local")
            for prefix in ("", "Pure")
            for system in ("Posix", "Windows", "")
        ),
        *("argparse.Namespace", "types.SimpleNamespace"),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *("collections.defaultdict", "collections.deque", "collections.ChainMap", "collections.UserDict"),
        *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "uuid.SafeUUID", "http.HTTPStatus"),
        *(
            f"{builtins}.{name}"
            for builtins in ("builtins", "__builtin__")
            for name in ("int", "float", "bool", "str", "list", "tuple", "dict", "frozenset", "slice", "object")
        ),
        *(
            f"{builtins}.{name}"
            for builtins in ("builtins", "__builtin__")
            for name in ("bytes", "bytearray", "range", "xrange", "complex")
        ),
        *("__builtin__.long", "__builtin__.unicode", "_io.BytesIO", "io.BytesIO"),
        *("copyreg._reconstructor", "copy_reg._reconstructor"),
        "torch.torch_version.TorchVersion",
    }
)
#: Packages whose classes do not count as the user's own, besides those of providers: some of them do more than hold a
#: value.
_NOT_OWN = sys.stdlib_module_names | {"torch", "numpy", "pip", "setuptools", "pkg_resources", "nt"}
#: The names of standard modules in Python 2. torch.save writes these names (`commands.Popen`), and unpickling replaces
#: them by those of Python 3 (`subprocess.Popen`).
_OLD_NAMES = frozenset(name.partition(".")[0] for name in [*IMPORT_MAPPING, *(module for module, _ in NAME_MAPPING)])
_GETATTR = frozenset({"builtins.getattr", "__builtin__.getattr"})
#: The text that a member of an enum may have as its value: a word or two, but no path and no code.
_WORDS = re.compile(r"[\w .:+-]{0,64}")


def all_inert(contents: Contents) -> bool:
    """Whether every object of a foreign class in a file is a plain value.

    Plain values are objects of standard types and, of the user's own classes, members of enums (made from one number or
    word) and subclasses of `dict` or `OrderedDict` that only get items. A name in the file that belongs to no object
    does not count as plain.
    """
    foreign = set(contents.foreign)
    values = [contents.tree] if contents.key is not None else [dict(contents.extras), dict(contents.metadata)]
    accounted = _accounted(values, foreign)
    return accounted is not None and accounted == foreign


def _accounted(values: list[Any], foreign: set[str]) -> set[str] | None:
    """Return the foreign names that belong to plain values; None if one of them is used in another way."""
    found: set[str] = set()
    seen: set[int] = set()
    while values:
        value = values.pop()
        if isinstance(value, Global):
            if value.dotted in foreign:
                if value.dotted not in _STANDARD:
                    return None
                found.add(value.dotted)
            continue
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Opaque):
            inside = _inside(value, foreign)
            if inside is None:
                return None
            found |= foreign & {value.call.dotted, *(arg.dotted for arg in _own_class(value))}
            values += inside
        elif isinstance(value, dict):
            values += [*value.keys(), *value.values()]
            if isinstance(value, OrderedDict):
                values.append(value.state)
        elif isinstance(value, list | tuple):
            values += value
        else:
            return None
    return found


_PLAIN = (TensorEntry, CompositeEntry, StorageRef, str, bytes, int, float, type(None))


def _inside(value: Opaque, foreign: set[str]) -> Iterable[Any] | None:
    """Return the values to check in an object; None if the object itself may not be a plain value."""
    if not isinstance(value.call, Global) or value.how == "newobj_ex":
        return None
    name = value.call.dotted
    parts = [value.args, value.state, *value.appended, *(part for item in value.items for part in item)]
    if name not in foreign or name in _STANDARD:
        return parts
    if _is_member_by_name(value):
        return ()
    if not _is_own_class(value.call) or value.state is not None or value.appended:
        return None
    if value.how == "reduce" and not value.items and _is_member_value(value.args):
        return ()
    return parts if value.args == () else None


def _own_class(value: Opaque) -> Iterable[Global]:
    """Return the class of an enum member that is pickled by its name."""
    return (value.args[0],) if _is_member_by_name(value) else ()


def _is_member_by_name(value: Opaque) -> bool:
    """Whether a value is `getattr(Enum, "NAME")`, as some versions of Python pickle a member of an enum."""
    if not isinstance(value.call, Global) or value.call.dotted not in _GETATTR or value.state is not None:
        return False
    match value.args:
        case Global() as kind, str() as name:
            return _is_own_class(kind) and name.isidentifier() and not name.startswith("_")
    return False


def _is_member_value(args: Any) -> bool:
    """Whether arguments consist of one value that a member of an enum may have."""
    if not isinstance(args, tuple) or len(args) != 1:
        return False
    values = args[0] if isinstance(args[0], tuple) and len(args[0]) < limits.DIMENSIONS.value else args
    return all(
        value is None
        or type(value) in (int, float, bool)
        or (isinstance(value, str) and _WORDS.fullmatch(value) is not None)
        for value in values
    )


def _is_own_class(kind: Global) -> bool:
    """Whether a name can be the user's own class: its module belongs to no known package, and it is in CapWords."""
    package = kind.module.partition(".")[0]
    return (
        re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", kind.module, re.ASCII) is not None
        and package not in _NOT_OWN.union(providers.packages())
        and package not in _OLD_NAMES
        and re.fullmatch(r"_?[A-Z]\w*", kind.name, re.ASCII) is not None
    )

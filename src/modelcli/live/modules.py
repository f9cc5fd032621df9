"""Module expressions made into modules: `Linear(4096,10)` to `nn.Linear(4096, 10)`, looked up, never evaluated."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from modelcli.errors import ModelcliError, RequestError, UnsafeError, closest, did_you_mean
from modelcli.language import expressions
from modelcli.language.expressions import HOLE, Call, Name
from modelcli.language.quoting import command, quoted
from modelcli.live import providers, signatures, user_code
from modelcli.live.sources import dtype_of
from modelcli.live.walking import modules_in
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.providers import class_packages
from modelcli.providers import owner as owner_of
from modelcli.providers.known_code import is_known_name

#: Layers that one argument may ask for; those of an RNN take time that grows with their square.
MAX_LAYERS = 2_000
_LAYERS = re.compile(r"num_(\w+_)?layers")


def find_class(dotted: str, *, trusted: bool) -> type[nn.Module]:
    """The class that a name stands for: of a known library, as its provider says, or `package.module:Class`.

    Only modules of known libraries are imported unless `trusted`. Raises RequestError with the closest names.
    """
    package, name = _parts(dotted)
    if is_known_name(dotted):
        found = _known_class(package, name)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
        near = closest(name, class_names())
        raise RequestError(
            f"no class {dotted!r} in {class_packages()}",
            _in_other_places(name)
            or (
                f"did you mean {' or '.join(near)}?"
                if near
                else "a class of your own is written package.module:Class(...)"
            ),
        )
    if not trusted:
        raise untrusted(dotted)
    module = user_code.import_module(package)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        near = closest(name, classes_in(module))
        raise RequestError(f"no module class {name} in {package}", f"did you mean {near[0]}?" if near else None)
    return found


def _parts(dotted: str) -> tuple[str, str]:
    """The package and the name of `package.module:Class`; nets.py:Net, as a reference has it, is a module here."""
    package, _, name = dotted.replace(":", ".").rpartition(".")
    return package.removesuffix(".py"), name


def untrusted(what: str) -> UnsafeError:
    """The error where a file names code of no known library."""
    return UnsafeError(
        f"the file names {what}, no class of {class_packages()}, and following it would run that code",
        "--trust (trust=True in Python) follows it; --arch names an architecture instead",
    )


def _known_class(package: str, name: str) -> object:
    """What a known library has under a name. A bare name is looked up in each that has module classes."""
    if not package:
        found = (half.find_class("", name) for half in providers.with_classes())
        return next((value for value in found if value is not None), None)
    owner = owner_of(package)
    return None if owner is None else providers.half_of(owner).find_class(package, name)


def find_maker(dotted: str, *, trusted: bool) -> Callable[..., Any]:
    """The class that a name stands for, or the function that returns a module: a builder in an expression.

    A builder of a library is given without weights, whatever its own default is. Raises as `find_class` does.
    """
    package, name = _parts(dotted)
    if not is_known_name(dotted):
        found = getattr(user_code.import_module(package), name, None) if trusted else None
        if callable(found) and not isinstance(found, type | nn.Module):
            function: Callable[..., Any] = found
            return function
    elif package and (owner := owner_of(package)) is not None:
        builder = providers.half_of(owner).find_function(package, name)
        if builder is not None:
            return builder
    return find_class(dotted, trusted=trusted)


def full_name(dotted: str) -> tuple[str, str]:
    """The package and the name of a known class: a bare name has that of the first library which has the class."""
    package, name = _parts(dotted)
    if package:
        return package, name
    packages = (half.package_of(name) for half in providers.with_classes())
    return next((found for found in packages if found is not None), "torch.nn"), name


def _in_other_places(name: str) -> str | None:
    """Which classes of this name known libraries have that do not go by it alone, as an expression writes them."""
    for half in providers.with_classes():
        if found := half.places_of(name):
            how_many = "one" if len(found) == 1 else "several"
            return f"{half.provider.name} has {how_many}: {' or '.join(found)}"
    return None


def class_names() -> list[str]:
    """Every module class that goes by its bare name."""
    return sorted({name for half in providers.with_classes() for name in half.class_names()})


def classes_in(namespace: ModuleType) -> list[str]:
    """The module classes that a Python module has under public names."""
    return [
        name
        for name, value in vars(namespace).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_")
    ]


def make(call: Call, *, trusted: bool = True) -> nn.Module:
    """Call the constructor on the current device. Raises RequestError that shows its signature."""
    kind = find_maker(call.name, trusted=trusted)
    if call.has_hole:
        raise RequestError(f"{call}: _ keeps an old argument, but there is no old module", "write the argument out")
    args = [value_of(value, trusted=trusted) for value in call.args]
    kwargs = {key: _keyword(call, key, trusted=trusted) for key in call.kwargs}
    if is_known_name(call.name):
        _require_few(kind, args, kwargs, str(call))
    return construct(kind, args, kwargs, str(call))


def _keyword(call: Call, key: str, *, trusted: bool) -> Any:
    """The value of a keyword argument. An error over a bare word says how the text that it may be is written."""
    value = call.kwargs[key]
    try:
        return value_of(value, trusted=trusted)
    except RequestError as error:
        if isinstance(value, Name) and value.dotted.isidentifier():
            told = error.hint or ""
            start = f"{told} Text" if told.startswith("did you mean") else "text"
            meant = Call(call.name, call.args, {**call.kwargs, key: value.dotted})
            error.hint = f"{start} is quoted, and the module around it once more: {quoted(meant)}"
            if (words := expressions.to_words(meant)) is not None:
                error.hint += f"; or without brackets and quotes: {command(words)}"
        raise


def _require_few(kind: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], text: str) -> None:
    """Raise RequestError where a module is asked for so often that its constructor would not come back."""
    named = [*zip(parameter_names(kind), args, strict=False), *kwargs.items()]
    times = sum(value for name, value in named if _LAYERS.fullmatch(name) and isinstance(value, int))
    inside = sum(sum(1 for _ in modules_in(value)) for _, value in named if isinstance(value, nn.Module))
    if times * max(inside, 1) > MAX_LAYERS:
        raise RequestError(f"{text} has {times * max(inside, 1):,} layers; the limit is {MAX_LAYERS:,}")


def construct(
    kind: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], text: str, signature: str | None = None
) -> nn.Module:
    """Call a class or function that must give a module. Raises RequestError where its arguments are wrong."""
    check_arguments(kind, args, kwargs, text)
    try:
        module = kind(*args, **kwargs)
    except ModelcliError:
        raise
    except Exception as error:
        raise ConstructorError(text, error, _argument_meant(error, signature or signature_of(kind))) from error
    if not isinstance(module, nn.Module):
        raise RequestError(f"{text} gives {type(module).__name__}, not an nn.Module")
    return module


class ConstructorError(RequestError):
    """A constructor raised. `error` is what it raised: on the meta device that may only mean that it needs numbers."""

    def __init__(self, text: str, error: Exception, signature: str | None) -> None:
        super().__init__(f"{text}: {_first_line(error)}", signature)
        self.error = error

    @property
    def may_need_numbers(self) -> bool:
        text = str(self.error).lower()
        return isinstance(self.error, NotImplementedError) or "meta" in text or "numpy" in text


def check_arguments(kind: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], text: str) -> None:
    """Raise RequestError where the arguments do not fit the signature."""
    try:
        signature = signatures.of(kind)
    except (TypeError, ValueError):
        return
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise RequestError(f"{text}: {error}", _argument_meant(error, signature_of(kind))) from None
    check_flags(signature.parameters, bound.arguments, text)


def check_flags(parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any], text: str) -> None:
    """Raise RequestError where text is given for a parameter that is True or False: Python takes any text for True."""
    for name, value in given.items():
        if isinstance(value, str) and name in parameters and parameters[name].annotation in (bool, "bool"):
            raise RequestError(f"{text}: {name} is True or False, not {value!r}", f"{name}=True or {name}=False")


def _argument_meant(error: Exception, signature: str | None) -> str | None:
    """The signature, behind the names in it that come near one that the constructor does not have."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is None or not isinstance(error, TypeError) or signature is None:
        return signature
    near = did_you_mean(unknown[1], re.findall(r"(?<=[(\s])(\w+)(?=[:=,)])", signature))
    return f"{near} {signature}" if near else signature


def signature_of(kind: Callable[..., Any]) -> str | None:
    """`Linear(in_features: int, out_features: int, bias: bool = True)`, without what only torch itself passes."""
    try:
        signature = signatures.of(kind)
        with contextlib.suppress(Exception):  # annotations as text may name what is not there
            signature = inspect.signature(kind, eval_str=True)
    except (TypeError, ValueError):
        return None
    parameters = [
        parameter
        for name, parameter in signature.parameters.items()
        if name not in ("device", "dtype") and parameter.kind is not parameter.VAR_KEYWORD
    ]
    return f"{kind.__name__}{signature.replace(parameters=parameters, return_annotation=signature.empty)}"


def parameter_names(kind: Callable[..., Any]) -> list[str]:
    """The names of a constructor's arguments, in order; those of a base where it only hands them on (`LSTM`)."""
    names = list(signatures.of(kind).parameters)
    if names[:1] == ["args"] and inspect.isclass(kind):
        for base in kind.__mro__[1:]:
            inner = list(signatures.of(base).parameters) if base is not object else []
            if inner and inner[0] != "args":
                return [name for name in inner if name != "mode"]  # RNNBase's own, which its subclasses set
    return names


def value_of(value: Any, *, trusted: bool) -> Any:
    """A plain value, with nested calls made into modules and names into classes and dtypes."""
    match value:
        case Call():
            return make(value, trusted=trusted)
        case Name(dotted=dotted):
            return _named(dotted, trusted=trusted)
        case tuple():
            return tuple(value_of(item, trusted=trusted) for item in value)
        case list():
            return [value_of(item, trusted=trusted) for item in value]
        case dict():
            return {key: value_of(item, trusted=trusted) for key, item in value.items()}
        case _:
            assert value is not HOLE
            return value


def _named(dotted: str, *, trusted: bool) -> Any:
    short = dotted.removeprefix("torch.")
    if short in ITEM_BYTES:
        return dtype_of(short)
    return find_class(dotted, trusted=trusted)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]

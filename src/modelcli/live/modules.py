"""Build modules from module expressions: `Linear(4096,10)` gives `nn.Linear(4096, 10)`. No text is run as Python."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
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

#: The most layers that one constructor call may build. The time to build an RNN grows with the square of its layers.
MAX_LAYERS = 2_000
_LAYERS = re.compile(r"num_(\w+_)?layers")


def find_class(dotted: str, *, trusted: bool) -> type[nn.Module]:
    """Return the module class of a name.

    Args:
        dotted: the name of a class of a known library (`Linear`, `torch.nn:Linear`), or `package.module:Class`.
        trusted: whether Python modules outside the known libraries may be imported.

    Raises:
        RequestError: there is no such class. The error names the closest classes.
        UnsafeError: the class is outside the known libraries, and `trusted` is False.
    """
    package, name = _parts(dotted)
    if is_known_name(dotted):
        found = _known_class(package, name)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
        near = closest(name, class_names())
        raise RequestError(
            f"no class {dotted!r} in {class_packages()}",
            _classes_with_package(name)
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
    """Split `package.module:Class` into the package and the class name. `nets.py:Net` means the module `nets`."""
    package, _, name = dotted.replace(":", ".").rpartition(".")
    return package.removesuffix(".py"), name


def untrusted(what: str) -> UnsafeError:
    """Return the error for a file that names code outside the known libraries."""
    return UnsafeError(
        f"the file names {what}, no class of {class_packages()}, and following it would run that code",
        "--trust (trust=True in Python) follows it; --arch names an architecture instead; --bare-keys works on the "
        "keys alone",
    )


def _known_class(package: str, name: str) -> object:
    """Return what a known library calls by this name; None if nothing. A bare name is looked up in all libraries."""
    if not package:
        found = (half.find_class("", name) for half in providers.with_classes())
        return next((value for value in found if value is not None), None)
    owner = owner_of(package)
    return None if owner is None else providers.half_of(owner).find_class(package, name)


def find_maker(dotted: str, *, trusted: bool) -> Callable[..., Any]:
    """Return the class of a name, or the function if the name is that of a builder.

    A library's builder is wrapped so that it loads no weights, even if it would by default. The arguments and errors
    are those of `find_class`.
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
    """Return the package and the name of a known class. The package of a bare name is the first that has the class."""
    package, name = _parts(dotted)
    if package:
        return package, name
    packages = (half.package_of(name) for half in providers.with_classes())
    return next((found for found in packages if found is not None), "torch.nn"), name


def _classes_with_package(name: str) -> str | None:
    """Return a hint with the classes of this name that must be written with their package; None if there are none."""
    for half in providers.with_classes():
        if found := half.places_of(name):
            how_many = "one" if len(found) == 1 else "several"
            return f"{half.provider.name} has {how_many}: {' or '.join(found)}"
    return None


def class_names() -> list[str]:
    """Return all module classes of known libraries that an expression may write without a package."""
    return sorted({name for half in providers.with_classes() for name in half.class_names()})


def classes_in(namespace: ModuleType) -> list[str]:
    """Return the public names of the module classes in a Python module."""
    return [
        name
        for name, value in vars(namespace).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_")
    ]


def make(call: Call, *, trusted: bool = True) -> nn.Module:
    """Build the module of an expression on the current device.

    Args:
        call: the expression. Nested calls are built first.
        trusted: whether Python modules outside the known libraries may be imported.

    Raises:
        RequestError: the arguments are wrong. The hint shows the constructor's signature.
    """
    kind = find_maker(call.name, trusted=trusted)
    if call.has_hole:
        raise RequestError(f"{call}: _ keeps an old argument, but there is no old module", "write the argument out")
    args = [value_of(value, trusted=trusted) for value in call.args]
    kwargs = {key: _keyword(call, key, trusted=trusted) for key in call.kwargs}
    if is_known_name(call.name):
        _require_few(kind, args, kwargs, str(call))
    return construct(kind, args, kwargs, str(call))


def _keyword(call: Call, key: str, *, trusted: bool) -> Any:
    """Return the value of a keyword argument. If it is a bare word, the error says how to write it as text."""
    value = call.kwargs[key]
    try:
        return value_of(value, trusted=trusted)
    except RequestError as error:
        if isinstance(value, Name) and value.dotted.isidentifier():
            hint = error.hint or ""
            start = f"{hint} Text" if hint.startswith("did you mean") else "text"
            corrected = Call(call.name, call.args, {**call.kwargs, key: value.dotted})
            error.hint = f"{start} is quoted, and the module around it once more: {quoted(corrected)}"
            if (words := expressions.to_words(corrected)) is not None:
                error.hint += f"; or without brackets and quotes: {command(words)}"
        raise


def _require_few(kind: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], text: str) -> None:
    """Raise RequestError for a call with so many layers that its constructor would run for hours."""
    named = [*zip(parameter_names(kind), args, strict=False), *kwargs.items()]
    times = sum(value for name, value in named if _LAYERS.fullmatch(name) and isinstance(value, int))
    inside = sum(sum(1 for _ in modules_in(value)) for _, value in named if isinstance(value, nn.Module))
    if times * max(inside, 1) > MAX_LAYERS:
        raise RequestError(f"{text} has {times * max(inside, 1):,} layers; the limit is {MAX_LAYERS:,}")


def construct(
    kind: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], text: str, signature: str | None = None
) -> nn.Module:
    """Call a class or function that must return a module.

    Args:
        kind: the class or function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        text: what errors call it.
        signature: the signature for hints; None for that of `kind`.

    Raises:
        RequestError: the arguments are wrong, or the result is not a module.
        ConstructorError: the call raised.
    """
    check_arguments(kind, args, kwargs, text)
    try:
        module = kind(*args, **kwargs)
    except ModelcliError:
        raise
    except Exception as error:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        raise ConstructorError(text, error, _argument_meant(error, signature or signature_of(kind)), given) from error
    if not isinstance(module, nn.Module):
        raise RequestError(f"{text} gives {type(module).__name__}, not an nn.Module")
    return module


class ConstructorError(RequestError):
    """A constructor raised `error`. On the meta device, the reason may only be that it needs values of tensors."""

    def __init__(self, text: str, error: Exception, signature: str | None, given: Sequence[nn.Module] = ()) -> None:
        super().__init__(f"{text}: {_first_line(error, given)}", signature)
        self.error = error

    @property
    def may_need_values(self) -> bool:
        """Whether the constructor may succeed outside the meta device, where tensors have values."""
        text = str(self.error).lower()
        return isinstance(self.error, NotImplementedError) or "meta" in text or "numpy" in text


def check_arguments(kind: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], text: str) -> None:
    """Raise RequestError if the arguments do not fit the signature of `kind`. `text` is what errors call it."""
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
    """Raise RequestError for text as the value of a bool parameter, because Python would treat any text as True."""
    for name, value in given.items():
        if isinstance(value, str) and name in parameters and parameters[name].annotation in (bool, "bool"):
            raise RequestError(f"{text}: {name} is True or False, not {value!r}", f"{name}=True or {name}=False")


def _argument_meant(error: Exception, signature: str | None) -> str | None:
    """Return the signature as a hint. After an unknown keyword argument, the closest parameter names come first."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is None or not isinstance(error, TypeError) or signature is None:
        return signature
    near = did_you_mean(unknown[1], re.findall(r"(?<=[(\s])(\w+)(?=[:=,)])", signature))
    return f"{near} {signature}" if near else signature


def signature_of(kind: Callable[..., Any]) -> str | None:
    """Return `Linear(in_features: int, out_features: int, bias: bool = True)`: no `device`, `dtype` or `**kwargs`."""
    try:
        signature = signatures.of(kind)
        with contextlib.suppress(Exception):  # evaluating a text annotation may raise
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
    """Return the names of a constructor's parameters in order; of a base's if it only forwards `*args` (`LSTM`)."""
    names = list(signatures.of(kind).parameters)
    if names[:1] == ["args"] and inspect.isclass(kind):
        for base in kind.__mro__[1:]:
            inner = list(signatures.of(base).parameters) if base is not object else []
            if inner and inner[0] != "args":
                return [name for name in inner if name != "mode"]  # RNNBase's own, which its subclasses set
    return names


def value_of(value: Any, *, trusted: bool) -> Any:
    """Return a value with nested calls replaced by modules, and names replaced by classes and dtypes."""
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


def _first_line(error: Exception, given: Sequence[nn.Module] = ()) -> str:
    """Return the first line of a message, which has the class of each `given` module in the place of its repr."""
    text = (str(error) or type(error).__name__).strip()
    if "\n" in text:
        for module in given:
            with contextlib.suppress(Exception):  # a class of one's own may fail to show itself
                text = text.replace(repr(module), type(module).__name__)
    return text.splitlines()[0]

"""Forbid downloads while modelcli shows a model, and detect constructors that load weights themselves."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.hub

from modelcli.errors import ModelcliError, RequestError
from modelcli.live import providers

#: The variables that make the Hugging Face libraries use their caches only.
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
#: The classes of the errors that these libraries raise for files that are not in their caches.
_NOT_CACHED = frozenset({"LocalEntryNotFoundError", "OfflineModeIsEnabled"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", ""})
_HINT = (
    "build it without weights (pretrained=False), or run modelcli load MODEL first, which fetches them into the "
    "library's own cache"
)


class DownloadError(RequestError):
    """Building a model would download something. (Libraries would retry an OSError for minutes.)"""

    def __init__(self, what: str) -> None:
        super().__init__(f"building the model would fetch {what}, but looking at a model downloads nothing", _HINT)


#: What `forbidden` has replaced, the latest last: each time a context that puts it back as it was before.
_REPLACED: list[Callable[[], contextlib.AbstractContextManager[None]]] = []


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """In the block requests are allowed again, for what modelcli itself asks for to describe a model."""
    with contextlib.ExitStack() as stack:
        for as_before in reversed(_REPLACED):
            stack.enter_context(as_before())
        yield


@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    """Make every download in the block raise DownloadError, with the address, at once."""
    with contextlib.ExitStack() as stack:
        stack.callback(_REPLACED.__delitem__, slice(len(_REPLACED), None))
        stack.enter_context(_hub_offline())
        for place, name in (
            (torch.hub, "download_url_to_file"),
            (torch.hub, "urlopen"),
            (urllib.request, "urlopen"),
            (urllib.request, "urlretrieve"),
        ):
            stack.enter_context(_refused(place, name, _refuse_address))
        for half in providers.in_use():
            for place, name in half.downloads():
                stack.enter_context(_refused(place, name, _refuse_call))
        resolve = socket.getaddrinfo

        def only_local(host: Any, *args: Any, **kwargs: Any) -> Any:
            name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
            if name is not None and name not in _LOCAL:
                raise DownloadError(f"something from {name}")
            return resolve(host, *args, **kwargs)

        stack.enter_context(_refused(socket, "getaddrinfo", only_local))
        try:
            yield
        except ModelcliError as error:
            if not isinstance(error, DownloadError) and is_not_cached(error):
                if (asked := asked_for(error)) is not None:
                    error.message += f" (building it would fetch {asked})"
                error.hint = f"looking at a model downloads nothing: {_HINT}"
            raise


def _refuse_address(address: Any, *_args: Any, **_kwargs: Any) -> Any:
    raise DownloadError(str(getattr(address, "full_url", address)))


def _refuse_call(*args: Any, **_kwargs: Any) -> Any:
    raise DownloadError(str(args[0]) if args else "something")


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """In the block the Hugging Face libraries use their caches only."""
    before, flags = {name: os.environ.get(name) for name in _OFFLINE}, _flags()
    _REPLACED.append(lambda: _hub_settings(before, flags))
    offline: dict[str, str | None] = dict.fromkeys(_OFFLINE, "1")
    with _hub_settings(offline, dict.fromkeys(flags, True)):
        yield


@contextlib.contextmanager
def _hub_settings(variables: Mapping[str, str | None], flags: Mapping[tuple[Any, str], bool]) -> Iterator[None]:
    """In the block these settings hold, and afterwards the earlier ones, also for libraries imported meanwhile."""
    before, known = {name: os.environ.get(name) for name in variables}, _flags()
    _set(variables, {place: flags.get(place, _is_true(variables["HF_HUB_OFFLINE"])) for place in known})
    try:
        yield
    finally:
        _set(before, {place: known.get(place, _is_true(before["HF_HUB_OFFLINE"])) for place in _flags()})


def _set(variables: Mapping[str, str | None], flags: Mapping[tuple[Any, str], bool]) -> None:
    for variable, value in variables.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value
    for (place, name), flag in flags.items():
        setattr(place, name, flag)


def _is_true(value: str | None) -> bool:
    """Whether the value of a variable switches a setting of the Hugging Face libraries on."""
    return value is not None and value.upper() in ("1", "ON", "YES", "TRUE")


def _flags() -> dict[tuple[Any, str], bool]:
    """Return the flags in which the imported libraries store those variables."""
    found: dict[tuple[Any, str], bool] = {}
    for module, name in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("transformers.utils.hub", "_is_offline_mode"),
    ):
        place = sys.modules.get(module)
        if place is not None and isinstance(flag := vars(place).get(name), bool):
            found[place, name] = flag
    return found


def is_not_cached(error: BaseException | None) -> bool:
    seen = 0
    while error is not None and seen < 20:
        if type(error).__name__ in _NOT_CACHED or "offline mode" in str(error).lower():
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def asked_for(error: BaseException | None) -> str | None:
    """Return the repository on the Hub, and the file in it, that the failed call wanted."""
    found: dict[str, str] = {}
    seen = 0
    while error is not None and seen < 20:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for name in ("repo_id", "path_or_repo_id", "filename"):
                if isinstance(value := frame.f_locals.get(name), str):
                    found[name] = value
        error, seen = error.__cause__ or error.__context__, seen + 1
    repository = found.get("repo_id") or found.get("path_or_repo_id")
    if repository is None:
        return None
    return f"{found['filename']} of {repository}" if "filename" in found else repository


@contextlib.contextmanager
def loads_recorded() -> Iterator[list[str]]:
    """Record the calls in the block that load weights: `torch.load`, safetensors, `from_pretrained`."""
    loads: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_recording(torch, "load", loads))
        if (safe := sys.modules.get("safetensors.torch")) is not None:
            for name in ("load_file", "load_model", "load"):
                stack.enter_context(_recording(safe, name, loads))
        if "transformers" in sys.modules:
            with contextlib.suppress(Exception):
                models = importlib.import_module("transformers.modeling_utils")
                stack.enter_context(_recording_class_method(models.PreTrainedModel, "from_pretrained", loads))
        yield loads


@contextlib.contextmanager
def _recording(place: Any, name: str, loads: list[str]) -> Iterator[None]:
    call: Callable[..., Any] = getattr(place, name)

    def recording(*args: Any, **kwargs: Any) -> Any:
        loads.append(name)
        return call(*args, **kwargs)

    with _replaced(place, name, recording):
        yield


@contextlib.contextmanager
def _recording_class_method(kind: Any, name: str, loads: list[str]) -> Iterator[None]:
    method = vars(kind)[name]

    def recording(own: Any, *args: Any, **kwargs: Any) -> Any:
        loads.append(name)
        return method.__func__(own, *args, **kwargs)

    setattr(kind, name, classmethod(recording))
    try:
        yield
    finally:
        setattr(kind, name, method)


@contextlib.contextmanager
def _refused(place: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The same as `_replaced`, which `allowed` takes back."""
    before = getattr(place, name)
    _REPLACED.append(lambda: _replaced(place, name, before))
    with _replaced(place, name, function):
        yield


@contextlib.contextmanager
def _replaced(place: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, before)

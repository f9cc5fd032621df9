"""No downloads while a model is looked at, and whether a constructor loads weights by itself."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.hub

from modelcli.errors import ModelcliError, RequestError
from modelcli.live import providers

#: What tells the libraries of Hugging Face to use nothing but what lies in their caches.
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
#: Errors that these libraries raise for what does not lie there, by the names of their classes.
_NOT_CACHED = frozenset({"LocalEntryNotFoundError", "OfflineModeIsEnabled"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", ""})
_HINT = (
    "leave its weights out (pretrained=False), or fetch them first into the library's own cache: modelcli load MODEL"
)


class DownloadError(RequestError):
    """Building a model would download something. It is no OSError, which the libraries try again for minutes."""

    def __init__(self, what: str) -> None:
        super().__init__(f"to build the model would fetch {what}, and looking at a model downloads nothing", _HINT)


@contextlib.contextmanager
def none_allowed() -> Iterator[None]:
    """Within the block, what would download raises DownloadError with the address, at once."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hub_offline())
        for place, name in (
            (torch.hub, "download_url_to_file"),
            (torch.hub, "urlopen"),
            (urllib.request, "urlopen"),
            (urllib.request, "urlretrieve"),
        ):
            stack.enter_context(_replaced(place, name, _refuse_address))
        for half in providers.in_use():
            for place, name in half.downloads():
                stack.enter_context(_replaced(place, name, _refuse_call))
        resolve = socket.getaddrinfo

        def local_alone(host: Any, *args: Any, **kwargs: Any) -> Any:
            name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
            if name is not None and name not in _LOCAL:
                raise DownloadError(f"something from {name}")
            return resolve(host, *args, **kwargs)

        stack.enter_context(_replaced(socket, "getaddrinfo", local_alone))
        try:
            yield
        except ModelcliError as error:
            if not isinstance(error, DownloadError) and _is_not_cached(error):
                if (asked := _asked_for(error)) is not None:
                    error.message += f" (to build it would fetch {asked})"
                error.hint = f"looking at a model downloads nothing: {_HINT}"
            raise


def _refuse_address(address: Any, *_args: Any, **_kwargs: Any) -> Any:
    raise DownloadError(str(getattr(address, "full_url", address)))


def _refuse_call(*args: Any, **_kwargs: Any) -> Any:
    raise DownloadError(str(args[0]) if args else "something")


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    known = _flags()
    for place, name in known:
        setattr(place, name, True)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        for place, name in _flags():  # those of libraries, too, that were imported in the meantime
            setattr(place, name, known.get((place, name), before["HF_HUB_OFFLINE"] in ("1", "ON", "YES", "TRUE")))


def _flags() -> dict[tuple[Any, str], bool]:
    """What the libraries that are imported keep of those variables."""
    found: dict[tuple[Any, str], bool] = {}
    for module, name in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("transformers.utils.hub", "_is_offline_mode"),
    ):
        place = sys.modules.get(module)
        if place is not None and isinstance(flag := vars(place).get(name), bool):
            found[place, name] = flag
    return found


def _is_not_cached(error: BaseException | None) -> bool:
    seen = 0
    while error is not None and seen < 20:
        if type(error).__name__ in _NOT_CACHED or "offline mode" in str(error).lower():
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _asked_for(error: BaseException | None) -> str | None:
    """The repository on the Hub, and its file, that the call which failed was asked for."""
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
def loads_noted() -> Iterator[list[str]]:
    """Note, within the block, what reads weights from a file: `torch.load`, safetensors, `from_pretrained`."""
    noted: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_noting(torch, "load", noted))
        if (safe := sys.modules.get("safetensors.torch")) is not None:
            for name in ("load_file", "load_model", "load"):
                stack.enter_context(_noting(safe, name, noted))
        if "transformers" in sys.modules:
            with contextlib.suppress(Exception):
                models = importlib.import_module("transformers.modeling_utils")
                stack.enter_context(_noting_class_method(models.PreTrainedModel, "from_pretrained", noted))
        yield noted


@contextlib.contextmanager
def _noting(place: Any, name: str, noted: list[str]) -> Iterator[None]:
    call: Callable[..., Any] = getattr(place, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        noted.append(name)
        return call(*args, **kwargs)

    with _replaced(place, name, noting):
        yield


@contextlib.contextmanager
def _noting_class_method(kind: Any, name: str, noted: list[str]) -> Iterator[None]:
    method = vars(kind)[name]

    def noting(own: Any, *args: Any, **kwargs: Any) -> Any:
        noted.append(name)
        return method.__func__(own, *args, **kwargs)

    setattr(kind, name, classmethod(noting))
    try:
        yield
    finally:
        setattr(kind, name, method)


@contextlib.contextmanager
def _replaced(place: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, before)

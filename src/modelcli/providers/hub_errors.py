"""Convert errors of huggingface_hub to modelcli's errors, with messages that say what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from modelcli.errors import FileFormatError, ModelcliError, RequestError, SystemFailureError, did_you_mean
from modelcli.providers.hub_names import HubModel, cached_repositories

_LOG_IN = "hf auth login, or set HF_TOKEN"
#: The classes of timeout errors of the HTTP clients that versions of huggingface_hub use.
_TIMEOUTS = frozenset({"TimeoutException", "Timeout", "TimeoutError"})
#: The classes of their connection errors.
_UNREACHED = frozenset({"TransportError", "ConnectionError"})


@contextlib.contextmanager
def converted(model: HubModel) -> Iterator[None]:
    """Raise a ModelcliError for each error of huggingface_hub in the block.

    Args:
        model: the requested model.
    """
    try:
        yield
    except ModelcliError:
        raise
    except Exception as error:
        raise _convert(error, model) from error


def is_unreachable(error: BaseException) -> bool:
    """Whether an error means that the Hub could not be reached, or failed; not that it refused the request."""
    if isinstance(error, ModelcliError) and error.__cause__ is not None:
        error = error.__cause__
    kinds = _kinds(error)
    return bool(kinds & (_TIMEOUTS | _UNREACHED)) or _status(error) >= 500


def is_missing_file(error: BaseException) -> bool:
    """Whether an error means that the repository exists, but not the file."""
    return "RemoteEntryNotFoundError" in _kinds(error)


def _convert(error: Exception, model: HubModel) -> ModelcliError:
    """Return modelcli's error for an error of huggingface_hub or of the system."""
    kinds, status = _kinds(error), _status(error)
    if "OfflineModeIsEnabled" in kinds:
        return _offline(model)
    if "GatedRepoError" in kinds:
        return _gated(model)
    if "DisabledRepoError" in kinds:
        return SystemFailureError(f"the Hub has disabled {model.repository}", f"see {_page(model)}")
    if "RevisionNotFoundError" in kinds:
        return _no_revision(model)
    if "RepositoryNotFoundError" in kinds:
        return _no_repository(model)
    if "HFValidationError" in kinds:
        return RequestError(f"{model.repository!r} is no name of a model on the Hub", "write hf:ORG/NAME@REVISION")
    if kinds & {"SafetensorsParsingError", "NotASafetensorsRepoError"}:
        return FileFormatError(f"{model} on the Hub has weights that are damaged: {_first_line(error)}")
    if status == 401:
        return SystemFailureError(f"{_endpoint()} does not accept your token", f"{_LOG_IN} to a valid token")
    if status == 403:
        return SystemFailureError(f"your token gives no access to {model.repository}", f"see {_page(model)}")
    if status == 429:
        return SystemFailureError(f"{_endpoint()} asks for fewer requests", f"try again later, or log in: {_LOG_IN}")
    if kinds & _TIMEOUTS:
        return SystemFailureError(
            f"{_endpoint()} did not answer in time",
            "try again; HF_HUB_ETAG_TIMEOUT=60 and HF_HUB_DOWNLOAD_TIMEOUT=60 wait longer",
        )
    if kinds & _UNREACHED:
        hint = "check the network; HF_HUB_OFFLINE=1 works with what was downloaded before"
        return SystemFailureError(f"{_endpoint()} cannot be reached: {_first_line(_innermost(error))}", hint)
    if "FileMetadataError" in kinds:
        return SystemFailureError(
            f"{_endpoint()} does not answer as the Hub does: {_first_line(error)}", "check HF_ENDPOINT"
        )
    return _of_system(error, status)


def _of_system(error: Exception, status: int) -> ModelcliError:
    """Return the error for a failure of the disk or the server, or for an unexpected error."""
    if status:
        return SystemFailureError(f"{_endpoint()} answers {status}: {_first_line(error)}", "try again later")
    for inner in _chain(error):
        if isinstance(inner, OSError) and inner.errno == errno.ENOSPC:
            return SystemFailureError(
                f"no space is left for the download in {_cache()}", "set HF_HOME to a folder on another disk"
            )
        if isinstance(inner, PermissionError):
            return SystemFailureError(f"cannot write to {inner.filename or _cache()}", "set HF_HOME to another folder")
    return SystemFailureError(f"the download failed: {type(error).__name__}: {_first_line(error)}")


def _offline(model: HubModel) -> ModelcliError:
    return SystemFailureError(
        f"{model} is not in the cache {_cache()}, and HF_HUB_OFFLINE forbids to ask the Hub",
        f"unset HF_HUB_OFFLINE, and {model.download_command} downloads it",
    )


def _gated(model: HubModel) -> ModelcliError:
    from huggingface_hub import get_token

    if get_token() is None:
        message, then = f"{model.repository} is gated, and no token was sent", f"then log in: {_LOG_IN}"
    else:
        message, then = f"{model.repository} is gated, and your token has no access to it", "then try again"
    return SystemFailureError(message, f"accept its terms at {_page(model)}, {then}")


def _no_repository(model: HubModel) -> ModelcliError:
    hints = []
    if (near := did_you_mean(model.repository, cached_repositories())) is not None:
        hints.append(near)
    hints.append(f"a private model needs a token: {_LOG_IN}")
    return RequestError(f"the Hub has no model {model.repository}, or you may not see it", "; ".join(hints))


def _no_revision(model: HubModel) -> ModelcliError:
    from huggingface_hub import HfApi

    hint = None
    with contextlib.suppress(Exception):
        refs = HfApi().list_repo_refs(model.repository)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        hint = did_you_mean(model.revision, names) or f"it has {', '.join(names[:6])}"
    return RequestError(f"{model.repository} has no branch, tag or commit {model.revision}", hint)


def _kinds(error: BaseException) -> set[str]:
    """Return the class names of an error and its causes. Names work for every HTTP client of huggingface_hub."""
    return {kind.__name__ for inner in _chain(error) for kind in type(inner).__mro__}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that caused it."""
    found: BaseException | None = error
    for _ in range(20):
        if found is None:
            return
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _innermost(error: BaseException) -> BaseException:
    *_, last = _chain(error)
    return last


def _status(error: BaseException) -> int:
    """Return the HTTP status of the response that caused an error; 0 if there was no response."""
    for inner in _chain(error):
        status = getattr(getattr(inner, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return 0


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _page(model: HubModel) -> str:
    return f"{_endpoint()}/{model.repository}"


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)

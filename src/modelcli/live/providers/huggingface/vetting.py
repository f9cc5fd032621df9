"""What a `config.json` may say: nothing that would be run, read or fetched, and no size that nobody has.

A configuration is as hostile as any file. It is looked through before transformers reads it, and transformers reads it
without the network, without printing, and within the bounds of `live.bounds`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from modelcli.checkpoints import limits
from modelcli.errors import FileFormatError, UnsafeError
from modelcli.live import bounds, downloads
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.providers import layer_counts

#: The entries that name Python files: of models, and of diffusion pipelines.
REMOTE_CODE = ("auto_map", "custom_pipelines")
#: How attention and experts are computed. What names a kernel of the Hub names code; what transformers has itself is
#: left to it, because every pass here uses the plain implementations.
_IMPLEMENTATIONS = re.compile(r"_?(?:attn|experts)_implementation(?:_internal)?|use_kernels|kernel_config")
_NEVER_READ = frozenset({"trust_remote_code", *REMOTE_CODE})
#: Entries whose text transformers keeps and does not use, and the names of classes, which are anybody's words.
_JUST_TEXT = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "finetuning_task", "id2label", "label2id", "pretrained_cfg"}
)
#: The arguments of `timm.create_model` that load weights or a configuration.
_LOADING = frozenset(
    {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "model_name"}
)
_DTYPES = frozenset({"dtype", "torch_dtype"})
#: How texts begin that name something elsewhere, and how files are called that hold code or weights.
_ELSEWHERE = re.compile(r"(?:[a-z][a-z0-9+.-]*://|hf[-_]hub:|local-dir:|file:|/|\\|~|[A-Za-z]:[\\/]|\.\.?[\\/])", re.I)
_FILE = re.compile(
    r"\.(?:pkl|pickle|joblib|pt|pth|bin|ckpt|npy|npz|h5|hdf5|safetensors|gguf|onnx|msgpack|py|so|dll|zip|tar)\s*$", re.I
)
#: The most labels that are made up for a number of classes.
_MAX_LABELS = 1_000_000
_MAX_INTEGER = 2**53
_MAX_DEPTH = 16
_MAX_VALUES = 500_000


def vetted(document: Mapping[str, Any], what: str, *, trust: bool) -> dict[str, Any]:
    """The configuration without what is not read of it, such as the names of Python files.

    Args:
        document: the configuration as JSON values.
        what: what it is of, for messages.
        trust: whether it may name code, and paths to load.

    Raises:
        UnsafeError: it names a kernel, a file, a path or an address, or asks for more layers than any model has.
        FileFormatError: it is too deep or too large, or has a value that no configuration has.
    """
    count = 0

    def look(value: Any, path: tuple[str, ...], *, is_text: bool) -> Any:
        nonlocal count
        count += 1
        if count > _MAX_VALUES or len(path) > _MAX_DEPTH:
            raise FileFormatError(
                f"the configuration of {what} has too many values, or values inside of too many others"
            )
        if isinstance(value, Mapping):
            if not is_text:
                for name in value:
                    _require_no_method(name, what)
            if not trust:
                _require_no_loading(value.get("model_args"), what)
            kept = {name: each for name, each in value.items() if is_text or not _is_left_out(name, each, what, trust)}
            return {
                name: look(each, (*path, name), is_text=is_text or name in _JUST_TEXT) for name, each in kept.items()
            }
        if isinstance(value, list | tuple):
            return [look(each, (*path, str(index)), is_text=is_text) for index, each in enumerate(value)]
        if not is_text:
            _require_harmless(value, path, what, trust=trust)
        return value

    if (why := layer_counts.excess(document, limits.MODULES.value)) is not None:
        raise limits.too_many_modules(what, why)
    found: dict[str, Any] = look(document, (), is_text=False)
    return found


def _is_left_out(name: str, value: Any, what: str, trust: bool) -> bool:
    if name in _NEVER_READ:
        return True
    if _IMPLEMENTATIONS.fullmatch(name) is None:
        return False
    named = list(value.values()) if isinstance(value, Mapping) else [value]
    kernels = [each for each in named if isinstance(each, str) and "/" in each]
    if kernels and not trust:
        raise UnsafeError(
            f"the configuration of {what} names code of the Hub as its {name}: {kernels[0]!r}",
            f"remove {name} from its config.json: modelcli computes attention and experts plainly",
        )
    return True


def _require_no_loading(arguments: Any, what: str) -> None:
    """Raise UnsafeError where arguments for a model of timm ask for weights, or for another configuration."""
    if isinstance(arguments, Mapping) and (asked := sorted(_LOADING & {k for k, v in arguments.items() if v})):
        raise UnsafeError(
            f"the configuration of {what} asks timm to load something: {asked[0]} is {arguments[asked[0]]!r:.60}",
            "remove it from the model_args of its config.json, or pass --trust if you trust whoever made it",
        )


def _require_no_method(name: str, what: str) -> None:
    """Raise FileFormatError for an entry that would take the place of a method of the configuration."""
    from transformers import PreTrainedConfig

    if (name.startswith("__") and name != "__float__") or callable(getattr(PreTrainedConfig, name, None)):
        raise FileFormatError(
            f"the configuration of {what} has an entry {name!r}, which is no value of a configuration"
        )


def _require_harmless(value: Any, path: tuple[str, ...], what: str, *, trust: bool) -> None:
    name = next((part for part in reversed(path) if not part.isdecimal()), "")
    place = ".".join(path)
    if isinstance(value, str):
        if name in _DTYPES and value != "auto" and value.removeprefix("torch.") not in ITEM_BYTES:
            raise FileFormatError(f"the configuration of {what} has {place}={value!r}, which is no dtype")
        if not trust and (_ELSEWHERE.match(value) or _FILE.search(value)):
            raise UnsafeError(
                f"the configuration of {what} names something to load: {place} is {value!r}",
                "remove it from the config.json, or pass --trust if you trust whoever made it",
            )
    elif isinstance(value, int) and not isinstance(value, bool) and name not in _DTYPES:
        most = _MAX_LABELS if name == "num_labels" else _MAX_INTEGER
        if abs(value) > most:
            raise FileFormatError(f"the configuration of {what} has {place}={value}, and at most {most:,} is possible")
    elif name in _DTYPES and value is not None:
        raise FileFormatError(f"the configuration of {what} has {place}={value!r}, which is no dtype")


@contextlib.contextmanager
def contained(limit: bounds.Bounds | None = None) -> Iterator[None]:
    """Let transformers work in the block without the network, without a word to the user, and within bounds."""
    with quiet(), downloads.forbidden(), bounds.enforced(limit):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In the block, what transformers and huggingface_hub log, warn and print is dropped."""
    with (
        without_logs(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """In the block, collect what transformers warns of by its log, a line for each warning, instead of printing it."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = " ".join(record.getMessage().split())
            if line not in found:
                found.append(line)

    logger = logging.getLogger("transformers")
    before = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Collector(logging.WARNING)], False
    logger.setLevel(logging.WARNING)
    try:
        yield found
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1:]


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """In the block, transformers and huggingface_hub log nothing."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

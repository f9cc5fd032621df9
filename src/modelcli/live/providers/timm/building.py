"""Models as `timm.create_model` makes them, with errors that name the argument or the weights that are wrong."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from modelcli.errors import ModelcliError, RequestError, SystemFailureError, did_you_mean
from modelcli.wording import listed

#: Arguments of `timm.create_model` that modelcli decides itself, with what says the same here.
RESERVED: Mapping[str, str] = {
    "pretrained": "--weights says where the values come from: --weights DEFAULT, or a tag",
    "checkpoint_path": "--weights says where the values come from: --weights FILE",
    "cache_dir": "$HF_HOME and $TORCH_HOME say where timm's cache is",
    "device": "modelcli builds models without values, and writes files without a device",
}


@dataclass(frozen=True)
class TimmModel:
    """What `timm.create_model` is called with.

    Attributes:
        name: its first argument: `resnet50`, `resnet50.a1_in1k`, `local-dir:/path/to/a/folder`.
        arguments: the keyword arguments.
        text: the reference, for messages.
    """

    name: str
    arguments: Mapping[str, Any]
    text: str

    def with_weights(self, tag: str) -> TimmModel:
        """The model as the weights with this tag have it: the tag decides classes and the size of images."""
        return replace(self, name=f"{self.name.partition('.')[0]}.{tag}".rstrip("."))

    def create(self, *, pretrained: bool = False) -> nn.Module:
        """The model on the current device. Its values are random, or those that timm's `load_pretrained` gives it.

        Raises RequestError for arguments that the model does not take.
        """
        import timm

        try:
            with quiet():
                module: nn.Module = timm.create_model(self.name, pretrained=pretrained, **self.arguments)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in self.arguments:
                raise
            taken = _arguments_taken(error)
            hint = did_you_mean(unknown[1], taken) or f"it takes {listed(taken, 12)}"
            raise RequestError(f"{self.text}: timm's {self.name} has no argument {unknown[1]!r}", hint) from None
        return module

    def create_pretrained(self) -> nn.Module:
        """The model with pretrained values, which timm downloads into its cache where they are not there yet.

        Raises SystemFailureError where that fails.
        """
        try:
            with _progress_on_terminals_alone():
                return self.create(pretrained=True)
        except ModelcliError:
            raise
        except Exception as error:
            if not _is_failed_download(error):
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SystemFailureError(
                f"cannot download the weights of timm:{self.name}: {first}",
                "give a file instead, --weights FILE, or put it where timm's cache looks ($HF_HOME, $TORCH_HOME)",
            ) from error


def _arguments_taken(error: BaseException) -> list[str]:
    """The arguments of the class that timm was about to make when an error came up, and those that all models take."""
    names = {"num_classes", "in_chans", "features_only", "out_indices", "pretrained_cfg", "pretrained_cfg_overlay"}
    step = error.__traceback__
    while step is not None:
        kind = step.tb_frame.f_locals.get("model_cls")
        if isinstance(kind, type):
            names |= {
                parameter.name
                for parameter in inspect.signature(kind).parameters.values()
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            }
        step = step.tb_next
    return sorted(names)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep timm from warning on standard error of what no user of modelcli can act on."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="timm")
            warnings.filterwarnings("ignore", message="Mapping deprecated model name")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _progress_on_terminals_alone() -> Iterator[None]:
    """Let timm and the Hub show how far a download is where a person sees it."""
    import huggingface_hub.utils as hub
    import timm.models

    shown, hidden = sys.stderr.isatty(), hub.are_progress_bars_disabled()
    timm.models.set_pretrained_download_progress(shown)
    if not shown and not hidden:
        hub.disable_progress_bars()
    try:
        yield
    finally:
        timm.models.set_pretrained_download_progress(False)
        if not shown and not hidden:
            hub.enable_progress_bars()


def _is_failed_download(error: BaseException | None) -> bool:
    """Whether an error comes from the network, or from the client of the Hub."""
    while error is not None:
        origin = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or origin in ("huggingface_hub", "httpx", "requests"):
            return True
        error = error.__cause__
    return False

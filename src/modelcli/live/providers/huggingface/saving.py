"""A model of transformers as `save_pretrained` writes it: its keys, its configuration, and the files beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from modelcli.checkpoints.layout import Bytes
from modelcli.live.providers import companions
from modelcli.live.providers.base import ModelFolder
from modelcli.live.providers.huggingface import conversion, edited_configuration
from modelcli.providers import configuration

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from modelcli.live.providers.huggingface.configurations import Described


def model_folder(module: nn.Module, described: Described, folder: Path | None) -> ModelFolder | None:
    """The folder that `from_pretrained` takes for an edited model; None where an edit left no model of transformers.

    Args:
        module: the edited model, on the meta device.
        described: what the configuration described before the edits.
        folder: the folder that the model was opened from, whose other files are copied; None where there is none.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return None
    left_out = edited_configuration.names_to_leave_out(module)
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in left_out}
    tensors = conversion.to_checkpoint_keys(module, state)
    edited = edited_configuration.of(module, described.configuration())
    beside = companions.of(folder)
    files = {**beside.files, configuration.NAME: Bytes(_as_json(edited.config, type(module).__name__))}
    changes = edited.changes_from(_current(described, folder))
    told = [f"{configuration.NAME}: {', '.join(changes)}"] if changes else []
    return ModelFolder(tensors, files, (*told, *edited.notes, *beside.notes))


def _current(described: Described, folder: Path | None) -> PreTrainedConfig:
    """The configuration in the model's folder, which earlier edits may have changed; else the one described."""
    document = None if folder is None else configuration.configuration_in(folder)
    if document is None:
        return described.configuration()
    return replace(described, document=document, overrides={}).configuration()


def _as_json(config: PreTrainedConfig, class_name: str) -> bytes:
    """A configuration as `save_pretrained` writes it."""
    config.architectures = [class_name]
    return config.to_json_string(use_diff=True).encode()  # type: ignore[no-any-return]

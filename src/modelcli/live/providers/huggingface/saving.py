"""A model of transformers as `save_pretrained` writes it: its keys, its configuration, and the files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from modelcli.checkpoints import formats
from modelcli.checkpoints.layout import Bytes
from modelcli.checkpoints.plan import Source
from modelcli.checkpoints.storage import Span, identity_of
from modelcli.live.providers.base import ModelFolder
from modelcli.live.providers.huggingface import conversion, edited_configuration
from modelcli.providers import configuration

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from modelcli.live.providers.huggingface.configurations import Described


#: Endings of weights in the formats of other libraries. A copy of them would hold the values before the edits.
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".mlmodel", ".tflite")


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
    companions: dict[str, Source] = (
        {} if folder is None else {path.name: _copy_of(path) for path in _other_files(folder)}
    )
    companions[configuration.NAME] = Bytes(_as_json(edited.config, type(module).__name__))
    changes = [f"{configuration.NAME}: {', '.join(edited.changes)}"] if edited.changes else []
    return ModelFolder(tensors, companions, (*changes, *edited.notes))


def _as_json(config: PreTrainedConfig, class_name: str) -> bytes:
    """A configuration as `save_pretrained` writes it."""
    config.architectures = [class_name]
    return config.to_json_string(use_diff=True).encode()  # type: ignore[no-any-return]


def _other_files(folder: Path) -> Iterator[Path]:
    """The files of a model's folder that are neither weights nor their index: tokenizer, generation and others."""
    for path in sorted(folder.iterdir()):
        name = path.name
        is_weights = formats.has_known_suffix(name) or formats.is_index(name) or name.endswith(_OTHER_WEIGHTS)
        if path.is_file() and not is_weights and not name.startswith("."):
            yield path


def _copy_of(path: Path) -> Span:
    """All bytes of a file."""
    identity = identity_of(path)
    return Span(path, 0, identity[0], identity)

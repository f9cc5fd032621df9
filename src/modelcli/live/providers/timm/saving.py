"""A model as timm keeps it in a folder: its configuration, by timm's own function, and the files beside it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelcli.checkpoints.layout import Bytes
from modelcli.live.providers import companions
from modelcli.live.providers.base import ModelFolder
from modelcli.live.providers.timm.building import quiet
from modelcli.providers import configuration
from modelcli.wording import counted, listed


def model_folder(
    module: nn.Module, landmarks: Mapping[str, tuple[str, ...]], folder: Path | None
) -> ModelFolder | None:
    """The folder that `timm.create_model("local-dir:...")` takes for an edited model.

    Args:
        module: the edited model, on the meta device.
        landmarks: the paths of its classifiers (`head`) and first layers (`stem`).
        folder: the folder that the model was opened from, whose other files are copied; None where there is none.

    Returns:
        The folder; None where edits have left no model of timm, and for the parts that `features_only` gives.
    """
    if not hasattr(module, "pretrained_cfg") or not hasattr(module, "num_features"):
        return None
    tensors = module.state_dict()
    tried: list[tuple[dict[str, Any], list[str]]] = []
    for described in _described(module, landmarks):
        document = _configuration(described)
        if document is None:
            return None
        tried.append((document, _notes(document, tensors)))
        if not tried[-1][1]:
            break
    document, notes = tried[-1] if not tried[-1][1] else tried[0]
    beside = companions.of(folder)
    files = {**beside.files, configuration.NAME: Bytes(json.dumps(document, indent=2).encode())}
    return ModelFolder(tensors, files, (*notes, *beside.notes), whole_for="timm")


def numbers_of_classes(module: nn.Module, landmarks: Mapping[str, tuple[str, ...]]) -> tuple[int, list[str]] | None:
    """How many classes an edited model has, and the paths of the modules that still say another number.

    Args:
        module: the edited model.
        landmarks: the paths of its classifiers (`head`).

    Returns:
        Both; None where its classifiers do not say one number, or the model says it already.
    """
    heads = landmarks.get("head", ())
    found = {_classes(module.get_submodule(path)) for path in heads}
    classes = found.pop() if len(found) == 1 else None
    before = getattr(module, "num_classes", None)
    if classes is None or not isinstance(before, int) or before == classes:
        return None
    above = {path.rpartition(".")[0] for path in heads if "." in path}
    paths = ["", *sorted(path for path in above if getattr(module.get_submodule(path), "num_classes", None) == before)]
    return classes, paths


def recorded_call(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which timm builds a model without its folder, from its configuration."""
    document = _configuration(module) or {}
    arguments = {key: _plain(value) for key, value in document.get("model_args", {}).items()}
    tag = document.get("pretrained_cfg", {}).get("tag")
    name = str(document.get("architecture", ""))
    return (f"{name}.{tag}" if tag and _is_known(f"{name}.{tag}") else name), arguments


def _described(module: nn.Module, landmarks: Mapping[str, tuple[str, ...]]) -> Iterator[nn.Module]:
    """Copies of a model that say of themselves how many classes they have after edits, as timm's models do.

    The first layer need not take the image itself, but groups of its pixels. So the channels are those that the model
    was built with, and in another copy those of its first layer.
    """
    classes = {size for path in landmarks.get("head", ()) if (size := _classes(module.get_submodule(path))) is not None}
    stems = [module.get_submodule(path) for path in landmarks.get("stem", ())]
    channels = {stem.in_channels for stem in stems if isinstance(stem, nn.Conv2d)}
    edited = {"num_classes": classes.pop()} if len(classes) == 1 else {}
    yield _saying(module, edited)
    if len(channels) == 1:
        yield _saying(module, {**edited, "in_chans": channels.pop()})


def _classes(layer: nn.Module) -> int | None:
    """How many classes a classifier tells apart; None where it does not say."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.Conv2d) else None


def _saying(module: nn.Module, attributes: Mapping[str, int]) -> nn.Module:
    """A copy of a module alone, whose parts are shared, with other values of attributes."""
    described = copy.copy(module)
    described.__dict__ = {**vars(module), **attributes}
    return described


def _configuration(module: nn.Module) -> dict[str, Any] | None:
    """The `config.json` that timm's own function writes for a model; None for a model that it cannot describe."""
    from timm.models import _hub

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / configuration.NAME
        try:
            with quiet():
                _hub.save_config_for_hf(module, str(path))
        except (AttributeError, KeyError, ValueError, TypeError):
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _notes(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What the configuration cannot say of an edited model: timm builds another one from it."""
    import timm

    given = dict(document.get("model_args", {}))
    name = str(document["architecture"])
    try:
        with quiet(), torch.device("meta"):
            built = timm.create_model(name, pretrained_cfg=dict(document["pretrained_cfg"]), **given).state_dict()
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [f"timm cannot build {name} from this {configuration.NAME}: {first}"]
    both = built.keys() & tensors.keys()
    other = [key for key in built if key not in both or built[key].shape != tensors[key].shape]
    other += [key for key in tensors if key not in both]
    if not other:
        return []
    return [
        f"{configuration.NAME} cannot say what the edits changed: timm.create_model builds {name} with other "
        f"{counted(len(other), 'tensor')} ({listed(other, 3)}), and does not load this folder"
    ]


def _is_known(name: str) -> bool:
    from timm.models import _registry

    return name in _registry._model_pretrained_cfgs


def _plain(value: Any) -> Any:
    """A JSON value as an expression has it: sizes as tuples."""
    return tuple(value) if isinstance(value, list) else value

"""Which modules of a model of transformers are the classifier and the first layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from modelcli.live.meta_models import build_on_meta
from modelcli.live.providers.huggingface.embeddings import input_embedding
from modelcli.live.sources import named_tensors

#: A number of labels that no other size of a model is, so that it shows which layers have it.
_LABELS = 7919
#: The attribute of a model that keeps what was found: a model is described after each edit, and building it takes time.
_FOUND = "_modelcli_head"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def of(model: Any) -> Mapping[str, tuple[str, ...]]:
    """Return the paths of the layers whose width is the number of labels (`head`), and of the first layer (`stem`)."""
    found = {"head": _head(model), "stem": _stem(model)}
    return {word: paths for word, paths in found.items() if paths}


def _head(model: Any) -> tuple[str, ...]:
    """The layers that have as many outputs as there are labels, if the class has them."""
    if _FOUND not in vars(model):
        vars(model)[_FOUND] = _built_with_labels(model) if _may_have_classifier(model) else ()
    found: tuple[str, ...] = vars(model)[_FOUND]
    return found


def _may_have_classifier(model: Any) -> bool:
    """Whether a model sets the number of labels, or something in it is as wide; building it shows the rest."""
    labels = getattr(model.config, "num_labels", None)
    if "num_labels" in vars(model):
        return True
    return any(tensor.dim() and tensor.shape[0] == labels for tensor in named_tensors(model).values())


def _built_with_labels(model: Any) -> tuple[str, ...]:
    config = copy.deepcopy(model.config)
    config.num_labels = _LABELS
    try:
        built = build_on_meta(lambda: type(model)(config))
    except Exception:  # the class takes no other number
        return ()
    wide = [name for name, tensor in named_tensors(built).items() if tensor.dim() and tensor.shape[0] == _LABELS]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in wide))


def _stem(model: Any) -> tuple[str, ...]:
    """The embedding of the tokens, or the first convolution over the channels that the configuration states."""
    embedding = input_embedding(model)
    channels = getattr(model.config, "num_channels", None)
    for path, child in model.named_modules():
        if child is embedding:
            return (path,)
        if embedding is None and isinstance(child, _CONVOLUTIONS) and child.in_channels == channels:
            return (path,)
    return ()

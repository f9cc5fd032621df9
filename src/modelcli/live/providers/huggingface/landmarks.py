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
#: How many outputs a classifier may have beyond one for each label: DETR has one for what is no object.
_BEYOND = (0, 1)
#: The attribute of a model that keeps what was found: a model is described after each edit, and building it takes time.
_FOUND = "_modelcli_head"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def of(model: Any) -> Mapping[str, tuple[str, ...]]:
    """Return the paths of the layers as wide as the number of labels (`head`), and of the first layer (`stem`)."""
    found = {"head": _head(model), "stem": _stem(model)}
    return {word: paths for word, paths in found.items() if paths}


def outputs_beyond_labels(model: Any) -> int:
    """How many outputs the classifier has beyond one for each label: 1 where one is for none of the labels, as in DETR.

    0 for a model without a classifier.
    """
    return _found(model)[1]


def _head(model: Any) -> tuple[str, ...]:
    """The layers that have as many outputs as there are labels, or one more, if the class has them."""
    return _found(model)[0]


def _found(model: Any) -> tuple[tuple[str, ...], int]:
    """The classifiers, and how many outputs they have beyond one for each label."""
    if _FOUND not in vars(model):
        vars(model)[_FOUND] = _built_with_labels(model) if _may_have_classifier(model) else ((), 0)
    found: tuple[tuple[str, ...], int] = vars(model)[_FOUND]
    return found


def _may_have_classifier(model: Any) -> bool:
    """Whether a model sets the number of labels, or something in it is as wide; building it shows the rest."""
    labels = getattr(model.config, "num_labels", None)
    if "num_labels" in vars(model):
        return True
    if not isinstance(labels, int):
        return False
    widths = {labels + more for more in _BEYOND}
    return any(tensor.dim() and tensor.shape[0] in widths for tensor in named_tensors(model).values())


def _built_with_labels(model: Any) -> tuple[tuple[str, ...], int]:
    config = copy.deepcopy(model.config)
    config.num_labels = _LABELS
    try:
        built = build_on_meta(lambda: type(model)(config))
    except Exception:  # the class takes no other number
        return (), 0
    tensors = named_tensors(built)
    for more in _BEYOND:
        wide = [name for name, tensor in tensors.items() if tensor.dim() and tensor.shape[0] == _LABELS + more]
        if wide:
            return tuple(dict.fromkeys(name.rpartition(".")[0] for name in wide)), more
    return (), 0


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

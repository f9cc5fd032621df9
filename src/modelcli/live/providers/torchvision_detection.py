"""What gives torchvision's detection models another number of classes.

The width of one layer does not decide it: a Faster R-CNN has a box for each class, and the heads of RetinaNet, FCOS
and SSD read the number from an attribute. `num_classes` includes the background, as it does in the builders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from modelcli.live.providers.base import ClassLayer, ClassLayers

#: The bias with which RetinaNet and FCOS begin: each class then has the probability 0.01 everywhere.
_PRIOR = f"constant({-math.log(0.99 / 0.01):.9g})"


def class_layers(kinds: list[str], module: nn.Module, number: int) -> ClassLayers | None:
    """Return the layers and settings that decide how many classes a detection model tells apart.

    Args:
        kinds: the names of the model's classes in torchvision, the nearest first.
        module: the model.
        number: the wanted number of classes, the background included.

    Returns:
        Them; None for other models, and where an edit has put something else in the place of torchvision's own heads.
    """
    rule = next((_RULES[kind] for kind in kinds if kind in _RULES), None)
    if rule is None:
        return None
    try:
        return rule(module, number)
    except (AttributeError, TypeError):
        return None


def _r_cnn(module: Any, number: int) -> ClassLayers:
    """A score and a box for each class; Mask R-CNN has a mask for each as well."""
    box = "roi_heads.box_predictor"
    layers = [ClassLayer(f"{box}.cls_score", number), ClassLayer(f"{box}.bbox_pred", 4 * number)]
    before = module.roi_heads.box_predictor.cls_score.out_features
    if module.roi_heads.mask_predictor is not None:
        drawn = "kaiming_normal(mode='fan_out',nonlinearity='relu')"
        path = "roi_heads.mask_predictor.mask_fcn_logits"
        layers.append(ClassLayer(path, number, weight=drawn))
    return ClassLayers(before, tuple(layers))


def _one_convolution(module: Any, number: int) -> ClassLayers:
    """The scores of each anchor, in one convolution (RetinaNet, FCOS)."""
    path, head = "head.classification_head", module.head.classification_head
    layer = ClassLayer(f"{path}.cls_logits", head.num_anchors * number, weight="normal(0,0.01)", bias=_PRIOR)
    return ClassLayers(head.num_classes, (layer,), ((path, "num_classes", number),))


def _a_convolution_for_each_level(module: Any, number: int) -> ClassLayers:
    """The scores of each anchor, in a convolution for each feature map (SSD, SSDlite)."""
    path, head = "head.classification_head", module.head.classification_head
    before = head.num_columns
    layers = []
    for name, block in head.module_list.named_children():
        is_lite = isinstance(block, nn.Sequential)
        last, *_ = [(below, child) for below, child in block.named_modules() if isinstance(child, nn.Conv2d)][::-1]
        place = ".".join(filter(None, (path, "module_list", name, last[0])))
        scheme = "normal(0,0.03)" if is_lite else "xavier_uniform"
        layers.append(ClassLayer(place, last[1].out_channels // before * number, weight=scheme, bias="zeros"))
    return ClassLayers(before, tuple(layers), ((path, "num_columns", number),))


_RULES: Mapping[str, Callable[[nn.Module, int], ClassLayers]] = {
    "FasterRCNN": _r_cnn,
    "RetinaNet": _one_convolution,
    "FCOS": _one_convolution,
    "SSD": _a_convolution_for_each_level,
}

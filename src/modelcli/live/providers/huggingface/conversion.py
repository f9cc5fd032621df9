"""Between the keys of a Hugging Face checkpoint and those of its model, by transformers' own rules.

About a quarter of the model types save keys unlike their modules: `vit.encoder.layer.0...` for `vit.layers.0...`, or
one tensor an expert where the module holds all experts in one. transformers lists such conversions for each model type,
and converts while it loads and saves. Here its own classes convert tensors on the meta device, so that nothing is read:
renamed, split and joined tensors keep the way to their bytes, and the others are computed when they are written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modelcli.errors import AnswerNoError
from modelcli.live.joining import JoinsKeepSources
from modelcli.live.sources import AnySource, Computed, real_tensor, require_source, source_of, tag

#: A conversion of transformers: `WeightRenaming`, `WeightConverter` and their subclasses.
Transform = Any


@dataclass
class _Group:
    """The tensors that one conversion makes others of.

    Attributes:
        transform: transformers' conversion; None for a tensor that is only renamed.
        parts: the tensors with their names and the pattern by which the conversion took each.
    """

    transform: Transform
    parts: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)

    def convert(self, model: nn.Module, name: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the conversion on these tensors in the place of `parts`."""
        transform: Transform = copy.deepcopy(self.transform)
        for (own, pattern, _), tensor in zip(self.parts, tensors, strict=True):
            transform.add_tensor(name, own, pattern, tensor)
        made = transform.convert(name, model=model, config=getattr(model, "config", None))
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def to_module_keys(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under the keys of the model's state dict.

    Args:
        model: a `PreTrainedModel`, on the meta device or not.
        state: the tensors by the keys of the checkpoint: on meta with their sources, or real ones.

    Returns:
        The converted tensors, in the order in which transformers loads them. A tensor that transformers does not
        convert keeps its key, also one that the model does not have.

    Raises AnswerNoError where transformers cannot convert a tensor.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = conversions_of(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    own = model.state_dict()
    prefix = str(getattr(model, "base_model_prefix", ""))
    groups: dict[str, _Group] = {}
    for key in sorted(state, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:  # it has the name of its module already
            name, pattern = rename_source_key(key, [], [], prefix, own)
        transform = by_pattern.get(pattern) if pattern is not None and name in own else None
        if transform is None:
            groups.setdefault(name if name in own else key, _Group(None)).parts.append((key, key, state[key]))
        else:
            groups.setdefault(name, _Group(transform)).parts.append((key, pattern, state[key]))
    return {name: tensor for name, tensor, _ in _each_converted(model, groups)}


def to_checkpoint_keys(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model's state dict under the keys that `save_pretrained` gives them.

    Args:
        model: the `PreTrainedModel` whose conversions are reversed.
        state: its state dict, each tensor on meta with its source, or real.

    Raises AnswerNoError where transformers cannot convert a tensor back.
    """
    from transformers.conversion_mapping import PrefixChange
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_converters,
        apply_renamings,
        dot_natural_key,
    )

    used = [each for each in conversions_of(model, legacy=False) if not isinstance(each, PrefixChange)]
    reverse = [each.reverse_transform() for each in reversed(used)]
    renamings = [each for each in reverse if isinstance(each, WeightRenaming)]
    converters = [each for each in reverse if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    groups: dict[str, _Group] = {}
    for key in sorted(state, key=dot_natural_key):
        name, pattern = apply_converters(key, converters)
        transform = None if pattern is None else by_pattern[pattern]
        if transform is None:
            groups.setdefault(apply_renamings(key, renamings), _Group(None)).parts.append((key, key, state[key]))
        else:
            groups.setdefault(name, _Group(transform)).parts.append((key, pattern, state[key]))
    return {
        apply_renamings(name, renamings) if computed else name: tensor
        for name, tensor, computed in _each_converted(model, groups)
    }


def conversions_of(model: nn.Module, *, legacy: bool = True) -> list[Transform]:
    """transformers' conversions for a model, in the order in which they are used; none for a model of another library.

    `legacy` includes the old names of TensorFlow's days, such as `LayerNorm.gamma`.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel):
        return []
    return list(get_model_conversion_mapping(model, add_legacy=legacy))


def _each_converted(model: nn.Module, groups: Mapping[str, _Group]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield each tensor with its new name, and whether a conversion made it."""
    for name, group in groups.items():
        tensors = [tensor for _, _, tensor in group.parts]
        if group.transform is None:
            yield name, tensors[-1], False  # of two keys that come to one name transformers takes the last
            continue
        try:
            with JoinsKeepSources():
                made = group.convert(model, name, tensors)
        except Exception as error:
            keys = ", ".join(key for key, _, _ in group.parts[:3])
            raise AnswerNoError(
                f"transformers cannot convert {keys}: {type(error).__name__}: {error}",
                "--bare-keys edits the keys as the file has them",
            ) from error
        _tag_computed(model, name, group, made)
        for key, tensor in made.items():
            yield key, tensor, True


def _tag_computed(model: nn.Module, name: str, group: _Group, made: Mapping[str, torch.Tensor]) -> None:
    """Give each result without a source one that runs the conversion on real tensors when its bytes are needed."""
    lost = {key: tensor for key, tensor in made.items() if tensor.is_meta and source_of(tensor) is None}
    if not lost:
        return
    reads: tuple[AnySource, ...] = tuple(require_source(tensor) for _, _, tensor in group.parts)
    for key, tensor in lost.items():
        size, dtype = tensor.element_size(), tensor.dtype

        def compute(
            start: int, nbytes: int, key: str = key, size: int = size, dtype: torch.dtype = dtype
        ) -> torch.UntypedStorage:
            made = group.convert(model, name, [real_tensor(part) for _, _, part in group.parts])
            flat = made[key].to(dtype).contiguous().view(-1)
            return flat[start // size : (start + nbytes) // size].clone().untyped_storage()

        nbytes = tensor.numel() * size
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        tag(empty, Computed(nbytes, compute, reads, step=max(nbytes, 1)))
        tensor.set_(empty.untyped_storage(), 0, empty.shape, empty.stride())

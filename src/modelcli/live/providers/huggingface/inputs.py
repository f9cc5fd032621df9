"""What a model of transformers takes: dummy inputs, by the arguments of its `forward` and its configuration.

A model names its main input (`main_input_name`), and the arguments of `forward` say what else it takes: the other half
of a pair of text and image, or what a decoder begins with. The configuration says their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import nn

from modelcli.language.input_texts import InputText
from modelcli.live import signatures
from modelcli.live.inputs import Inputs
from modelcli.live.providers.huggingface import passes

#: The tokens of a text, where the model takes as many.
TOKENS = 128
#: The side of an image whose size the configuration does not say, and the seconds of a sound.
IMAGE_SIDE, SECONDS = 224, 1
#: The samples of a second of sound, where the configuration does not say it, and the frames of a spectrogram.
SAMPLES_PER_SECOND, FRAMES = 16_000, 1_024

#: An input with more elements is none that anybody passes: the configuration is wrong.
_MOST_ELEMENTS = 10**9

#: The inputs that `forward` takes besides the main one, in the order in which they are shown. An argument that may be
#: left out and is none of them is left out.
_TEXT_AND_IMAGES = ("input_ids", "bbox", "pixel_values", "image_grid_thw", "mm_token_type_ids")
_SOUND = ("input_features", "input_values")
_DECODER = ("decoder_input_ids", "decoder_input_values")


def inputs_of(module: nn.Module, described: Callable[[], nn.Module] | None = None) -> Inputs | None:
    """The inputs of a model of transformers; None where it takes something that is not known here.

    Args:
        module: the model on the meta device, as it was built or edited.
        described: makes a copy of it whose configuration says what edits made, for a class that goes by it.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return None
    model = _Model(module, described)
    names = model.names()
    made: list[InputText] = []
    for name in names:
        shape = model.shape_of(name)
        if shape is None or prod(shape) > _MOST_ELEMENTS:
            return None
        made.append(InputText((name,), shape, _DTYPES.get(name)))
    values = {name: values for name in names if (values := model.values_of(name))}
    return Inputs((), named=tuple(made), values=values, with_values=_DECIDE_SHAPES & set(names))


def further_inputs_of(module: nn.Module) -> frozenset[str] | None:
    """The names that the `**kwargs` of a model's `forward` stand for; None for a class that is not transformers' own.

    A model hands them on to its parts, so that each name is one that a part takes, or one that transformers declares.
    """
    from transformers.utils import TransformersKwargs

    if not type(module).__module__.startswith("transformers."):
        return None
    names = set(TransformersKwargs.__annotations__)
    for kind in {type(child): child for child in module.modules()}.values():
        try:
            parameters = signatures.of(kind.forward).parameters.values()
        except (TypeError, ValueError):
            continue
        names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return frozenset(names)


#: The dtypes of inputs that are not in the model's own floating-point dtype.
_DTYPES = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "bbox", "image_grid_thw", "mm_token_type_ids"), "int64"),
}


#: The inputs whose values decide shapes: the patches of an image in each direction, and which tokens are of one.
_DECIDE_SHAPES = frozenset({"image_grid_thw", "mm_token_type_ids"})


@dataclass(frozen=True)
class _Model:
    """A model, and what its configuration says of what flows in."""

    module: Any
    described: Callable[[], nn.Module] | None = None

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def main(self) -> str:
        named = self.module.main_input_name
        return str(named if isinstance(named, str) else named[0])

    # --- names -------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of the arguments that are given."""
        parameters = signatures.of(self.module.forward).parameters
        needed = {
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        wanted = {self.main, *needed}
        wanted |= {name for name in _TEXT_AND_IMAGES if name in parameters}
        if "pixel_values" not in parameters:
            wanted |= {name for name in _SOUND if name in parameters}
        if getattr(self.config, "is_encoder_decoder", False):
            wanted |= {name for name in _DECODER if name in parameters}
        if "image_grid_thw" not in wanted:
            wanted.discard("mm_token_type_ids")
        if len(wanted & set(_DECODER)) == len(_DECODER):
            wanted.discard("decoder_input_values")
        if self.main == "inputs_embeds" and "input_ids" in wanted:
            wanted.discard(self.main)
        order = (*_TEXT_AND_IMAGES, *_SOUND, *_DECODER)
        return sorted(wanted, key=lambda name: (name != self.main, order.index(name) if name in order else -1))

    # --- shapes ------------------------------------------------------------------------------------------------------

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of an input, or None where it is not known."""
        maker = _SHAPES.get(name)
        return None if maker is None else maker(self)

    def text(self) -> tuple[int, ...]:
        """A text, with the tokens that an image or a sound takes the place of."""
        return (1, self.text_length() + self.placeholders())

    def decoder_text(self) -> tuple[int, ...]:
        config = self.config.get_text_config(decoder=True)
        return (1, min(self.text_length(), _positions(config) or TOKENS))

    def text_length(self) -> int:
        config = (
            self.config.get_text_config(encoder=True) if self._is_pair_of_texts() else self.config.get_text_config()
        )
        limit = _positions(config)
        if limit is None:
            return TOKENS
        return max(1, min(TOKENS, limit - self._positions_lost() - self.placeholders()))

    def _is_pair_of_texts(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def _positions_lost(self) -> int:
        """How many positions padding takes: RoBERTa counts from behind the index of the padding."""
        for name, child in self.module.named_modules():
            if name.endswith("position_embeddings") and isinstance(child, nn.Embedding):
                return 0 if child.padding_idx is None else child.padding_idx + 1
        return 0

    def boxes(self) -> tuple[int, ...]:
        """The place of each token on a page."""
        return (*self.text(), 4)

    def image(self) -> tuple[int, ...] | None:
        """An image, or its patches where the model takes them flat."""
        config = self._vision()
        channels = _count(config, "num_channels", "in_channels", "in_chans") or 3
        height, width = self._image_size(config)
        if "image_grid_thw" in self._parameters():
            patch, frames = _count(config, "patch_size") or 14, _count(config, "temporal_patch_size") or 1
            _, high, wide = self.grid()
            return (high * wide, channels * frames * patch * patch)
        if hasattr(config, "pretrained_cfg") and isinstance(size := config.pretrained_cfg.get("input_size"), list):
            return (1, *size)
        return (1, channels, height, width)

    def grid(self) -> tuple[int, int, int]:
        """Frames, and patches in height and width, of an image that is given by its patches."""
        config = self._vision()
        patch, merged = _count(config, "patch_size") or 14, _count(config, "spatial_merge_size") or 1
        side = max(1, IMAGE_SIDE // (patch * merged)) * merged
        return (1, side, side)

    def _image_size(self, config: Any) -> tuple[int, int]:
        found = getattr(config, "image_size", None)
        if isinstance(found, Mapping):
            found = [found.get("height"), found.get("width")]
        if isinstance(found, int):
            found = [found, found]
        if isinstance(found, Sequence) and len(found) == 2 and all(isinstance(side, int) for side in found):
            return (found[0], found[1])
        return (IMAGE_SIDE, IMAGE_SIDE)

    def wave(self) -> tuple[int, ...]:
        """A sound as samples, or as a spectrogram where the model takes one under this name."""
        bins, frames = _count(self.config, "num_mel_bins"), _count(self.config, "max_length")
        if bins and hasattr(self.config, "frequency_stride") and frames:
            return (1, frames, bins)
        rate = _count(self.config, "sampling_rate") or SAMPLES_PER_SECOND
        channels = _count(self.config, "audio_channels")
        return (1, channels, SECONDS * rate) if channels else (1, SECONDS * rate)

    def spectrogram(self) -> tuple[int, ...] | None:
        """A sound as a spectrogram: of the shape that Whisper takes, else frames before features."""
        config = self._audio()
        bins, positions = _count(config, "num_mel_bins"), _count(config, "max_source_positions")
        if bins and positions and hasattr(config, "encoder_layers") and not hasattr(config, "input_feat_per_channel"):
            return (1, bins, 2 * positions)
        per_channel = _count(config, "input_feat_per_channel")
        if per_channel:
            frames = min(FRAMES, positions or FRAMES)
            return (1, frames, per_channel * (_count(config, "input_channels_of_features") or 1))
        features = _count(config, "feature_projection_input_dim") or bins
        if hasattr(config, "spec_size") and bins:  # CLAP
            return (1, 1, FRAMES, bins)
        return (1, FRAMES, features) if features else None

    def decoder_frames(self) -> tuple[int, ...] | None:
        bins = _count(self.config, "num_mel_bins")
        return (1, TOKENS, bins) if bins else None

    def series(self) -> tuple[int, ...] | None:
        length, channels = _count(self.config, "context_length"), _count(self.config, "num_input_channels")
        return (1, length, channels) if length and channels else None

    # --- values ------------------------------------------------------------------------------------------------------

    def values_of(self, name: str) -> tuple[int, ...]:
        """The first values of an input of integers that cannot all be zero."""
        if name == "image_grid_thw":
            return self.grid()
        if name == "mm_token_type_ids":  # 1 for each token of an image
            return (1,) * self.placeholders()
        token = self._placeholder_token()
        return (token,) * self.placeholders() if name == "input_ids" and token is not None else ()

    def _placeholder_token(self) -> int | None:
        """The token in whose places a model of text and images puts what it made of the image."""
        return next(
            (
                token
                for name in ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
                if isinstance(token := getattr(self.config, name, None), int) and not isinstance(token, bool)
            ),
            None,
        )

    def placeholders(self) -> int:
        """How many tokens of the text an image takes: as many as the model makes features of it."""
        if self._placeholder_token() is None or self._merges_by_itself():
            return 0
        image = self.image()
        is_image = image is not None and prod(image) <= _MOST_ELEMENTS
        return self._image_tokens if is_image and self._image_tokens <= _MOST_ELEMENTS // 1_000 else 0

    @cached_property
    def _image_tokens(self) -> int:
        found = passes.image_tokens(self.module, self.image(), self.grid())
        if found is None and self.described is not None:
            found = passes.image_tokens(self.described(), self.image(), self.grid())
        return found or 0

    def _merges_by_itself(self) -> bool:
        return not hasattr(self.module, "get_image_features") or "pixel_values" not in self._parameters()

    # --- configurations ----------------------------------------------------------------------------------------------

    def _parameters(self) -> Mapping[str, Any]:
        return signatures.of(self.module.forward).parameters

    def _vision(self) -> Any:
        """The configuration of the part that sees: its own, that of a backbone, or the whole one."""
        for name in ("vision_config", "encoder", "backbone_config"):
            part = getattr(self.config, name, None)
            if part is not None and hasattr(part, "model_type"):
                return part
        return self.config

    def _audio(self) -> Any:
        part = getattr(self.config, "audio_config", None)
        return self.config if part is None else part


_SHAPES: Mapping[str, Callable[[_Model], tuple[int, ...] | None]] = {
    "input_ids": _Model.text,
    "bbox": _Model.boxes,
    "mm_token_type_ids": _Model.text,
    "decoder_input_ids": _Model.decoder_text,
    "pixel_values": _Model.image,
    "image_grid_thw": lambda _: (1, 3),
    "input_values": _Model.wave,
    "input_features": _Model.spectrogram,
    "decoder_input_values": _Model.decoder_frames,
    "past_values": _Model.series,
}


def _positions(config: Any) -> int | None:
    """How long a text may be, where the configuration says it."""
    return _count(config, "max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len")


def _count(config: Any, *names: str) -> int | None:
    """The first of these entries that is a positive whole number, or a pair of equal ones."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


__all__ = ["inputs_of"]

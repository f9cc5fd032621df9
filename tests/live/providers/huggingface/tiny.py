"""Tiny models of transformers, saved as folders: real classes and real conversions with a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}

#: The arguments of each model's configuration, by the name of its class.
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**SMALL, "tie_word_embeddings": True},
    "MixtralForCausalLM": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "tie_word_embeddings": False},
    "BertForSequenceClassification": {**SMALL, "num_labels": 3},
    "ViTForImageClassification": {
        **{key: value for key, value in SMALL.items() if key != "vocab_size"},
        "image_size": 32,
        "patch_size": 8,
    },
}


def model(name: str, seed: int = 0, **changed: Any) -> transformers.PreTrainedModel:
    """A model with random values, as the plain class makes it."""
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    made: transformers.PreTrainedModel = kind(kind.config_class(**{**MODELS[name], **changed}))
    return made.eval()


def saved(name: str, folder: Path, seed: int = 0, **changed: Any) -> transformers.PreTrainedModel:
    """The same, saved by `save_pretrained`."""
    made = model(name, seed, **changed)
    made.save_pretrained(folder)
    return made


def loaded(folder: Path) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """What `from_pretrained` makes of a folder, and what it reports of missing, unexpected and mismatched keys."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    found, info = kind.from_pretrained(folder, output_loading_info=True)
    return found, {key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}

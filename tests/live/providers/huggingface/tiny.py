"""Tiny models of transformers, saved as folders: real classes and real conversions with a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

#: The sizes of most encoders and decoders of text.
BODY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**BODY, "vocab_size": 100}
#: The sizes of decoders with fewer heads for keys and values.
GROUPED = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False}
#: Vision transformers.
PATCHES = {**BODY, "image_size": 32, "patch_size": 8}
#: Encoder-decoders.
PAIR = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
#: Models that take a waveform.
WAVE = {
    **BODY,
    "vocab_size": 40,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
PAIR_OF_TOWERS = {
    "text_config": {**SMALL, "projection_dim": 16, "max_position_embeddings": 20},
    "vision_config": {**PATCHES, "projection_dim": 16},
    "projection_dim": 16,
}

#: The arguments of each model's configuration, by the name of its class.
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**SMALL, "tie_word_embeddings": True},
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
    "BertForSequenceClassification": {**SMALL, "num_labels": 3},
    "ViTForImageClassification": PATCHES,
}

#: One class of each model type, beyond those.
MORE_MODELS: dict[str, dict[str, Any]] = {
    # encoders of text
    "RobertaForMaskedLM": {**SMALL, "max_position_embeddings": 40},
    "DistilBertForSequenceClassification": {
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 100,
    },
    "AlbertForMaskedLM": {**SMALL, "embedding_size": 16},
    "ElectraForPreTraining": {**SMALL, "embedding_size": 16},
    "DebertaV2ForSequenceClassification": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "ModernBertForMaskedLM": {
        **SMALL,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "MPNetForMaskedLM": SMALL,
    "XLMRobertaForTokenClassification": SMALL,
    "LayoutLMForTokenClassification": SMALL,
    "FNetForMaskedLM": {key: value for key, value in SMALL.items() if key != "num_attention_heads"},
    # decoders of text
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64},
    "GPTNeoXForCausalLM": SMALL,
    "OPTForCausalLM": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "word_embed_proj_dim": 32,
    },
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "FalconForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100},
    "MistralForCausalLM": {**GROUPED, "sliding_window": 16},
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 8},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 8, "tie_word_embeddings": True},
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 8, "tie_word_embeddings": True},
    "PhiForCausalLM": SMALL,
    "Phi3ForCausalLM": {**GROUPED, "pad_token_id": 0},
    "StableLmForCausalLM": GROUPED,
    "CohereForCausalLM": GROUPED,
    "Olmo2ForCausalLM": {**GROUPED, "pad_token_id": 0},
    # mixtures of experts
    "Qwen3MoeForCausalLM": {
        **GROUPED,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "DeepseekV3ForCausalLM": {
        **SMALL,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "GptOssForCausalLM": {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "OlmoeForCausalLM": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    # recurrent and state-space models
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4},
    "Mamba2ForCausalLM": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "RwkvForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "context_length": 64},
    # encoder-decoders
    "T5ForConditionalGeneration": T5,
    "MT5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": PAIR,
    "PegasusForConditionalGeneration": PAIR,
    "MarianMTModel": {**PAIR, "pad_token_id": 1, "decoder_start_token_id": 1},
    # images
    "DeiTForImageClassification": PATCHES,
    "BeitForImageClassification": PATCHES,
    "Dinov2ForImageClassification": PATCHES,
    "SwinForImageClassification": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32},
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "SegformerForSemanticSegmentation": {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 16,
    },
    "MobileViTForImageClassification": {
        "hidden_sizes": [8, 12, 16],
        "neck_hidden_sizes": [4, 8, 8, 12, 16, 20, 24],
        "image_size": 64,
        "num_attention_heads": 2,
    },
    "ViTMAEForPreTraining": {
        **PATCHES,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    },
    "DetrForObjectDetection": {
        **PAIR,
        "num_queries": 5,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
            "out_features": ["stage2"],
        },
    },
    "TimmWrapperForImageClassification": {"architecture": "resnet10t", "num_labels": 4},
    # sound
    "Wav2Vec2ForCTC": WAVE,
    "HubertForCTC": WAVE,
    "WavLMForCTC": WAVE,
    "WhisperForConditionalGeneration": {
        **PAIR,
        "num_mel_bins": 16,
        "max_source_positions": 50,
        "max_target_positions": 30,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "ASTForAudioClassification": {**BODY, "max_length": 64, "num_mel_bins": 32, "patch_size": 8},
    "Speech2TextForConditionalGeneration": {
        **PAIR,
        "input_feat_per_channel": 16,
        "conv_channels": 16,
        "num_conv_layers": 2,
        "conv_kernel_sizes": [3, 3],
        "max_source_positions": 100,
        "max_target_positions": 30,
    },
    # text with images
    "CLIPModel": PAIR_OF_TOWERS,
    "SiglipModel": PAIR_OF_TOWERS,
    "BlipForConditionalGeneration": PAIR_OF_TOWERS,
    "ChineseCLIPModel": PAIR_OF_TOWERS,
    "GitForCausalLM": {**SMALL, "vision_config": PATCHES},
    "LlavaForConditionalGeneration": {
        "text_config": {"model_type": "llama", **SMALL},
        "vision_config": {"model_type": "clip_vision_model", **PATCHES, "projection_dim": 16},
        "image_token_index": 99,
        "vision_feature_layer": -1,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {
            **GROUPED,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 14,
            "mlp_ratio": 2,
        },
        "image_token_id": 99,
        "video_token_id": 98,
        "vision_start_token_id": 97,
    },
    "PaliGemmaForConditionalGeneration": {
        "text_config": {"model_type": "gemma", **GROUPED, "head_dim": 8},
        "vision_config": {"model_type": "siglip_vision_model", **PATCHES, "projection_dim": 32},
        "projection_dim": 32,
        "image_token_index": 99,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": {**GROUPED, "head_dim": 8},
        "vision_config": PATCHES,
        "mm_tokens_per_image": 4,
        "image_token_index": 99,
    },
    # series of numbers
    "PatchTSTForPrediction": {
        "num_input_channels": 2,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 16,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "prediction_length": 8,
    },
}


def model(name: str, seed: int = 0, **changed: Any) -> transformers.PreTrainedModel:
    """Return a model with random values, as the plain class makes it."""
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    made: transformers.PreTrainedModel = kind(kind.config_class(**{**(MODELS | MORE_MODELS)[name], **changed}))
    return made.eval()


def saved(name: str, folder: Path, seed: int = 0, **changed: Any) -> transformers.PreTrainedModel:
    """Return such a model, and save it by `save_pretrained`."""
    made = model(name, seed, **changed)
    made.save_pretrained(folder)
    return made


def loaded(folder: Path) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """Load a folder by `from_pretrained`. Returns the model, and the missing, unexpected and mismatched keys."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    found, info = kind.from_pretrained(folder, output_loading_info=True)
    return found, {key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}

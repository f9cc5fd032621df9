"""Two transformers whose memory is measured. They are built from a configuration, so nothing is downloaded."""

from __future__ import annotations

from torch import nn


def bert() -> nn.Module:
    """BERT-base with a head of two classes."""
    import transformers

    return transformers.BertForSequenceClassification(transformers.BertConfig())


def llama() -> nn.Module:
    """A causal language model of 110 million parameters, with grouped queries."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    return transformers.LlamaForCausalLM(config)

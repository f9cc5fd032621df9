"""Hugging Face's transformers: models built from a configuration, their weights, and what they take."""

from __future__ import annotations

from modelcli.live.providers.huggingface.provider import LiveHuggingFace

__all__ = ["LiveHuggingFace"]

"""Hugging Face: folders with a `config.json`, models of the Hub, and classes of transformers by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from modelcli import installed
from modelcli.errors import ModelcliError
from modelcli.providers import configuration
from modelcli.providers.base import Provider

#: The files of weights, or their indexes, in the order in which `from_pretrained` looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class HuggingFace(Provider):
    """`runs/bert` (a folder), `hf:google-bert/bert-base-uncased@main(num_labels=3)`, `hf:LlamaConfig(...)`."""

    name = "transformers"
    live = "modelcli.live.providers.huggingface:LiveHuggingFace"
    prefix = "hf"
    extra = "hf"
    title = "a Hugging Face model (hf:ORG/NAME, or a folder with a config.json)"
    packages = ("transformers",)

    def is_known_code(self, name: str) -> bool:
        """Whether it names a class of transformers. Folders and models of the Hub are for the user to name."""
        return is_class_name(name)

    def recognises(self, folder: Path) -> bool:
        """Whether its configuration has a `model_type`, as those of transformers have."""
        try:
            document = configuration.configuration_in(folder)
        except ModelcliError:
            return False
        return document is not None and isinstance(document.get("model_type"), str)

    def compare_with_tensors(
        self, folder: Path, tensors: Mapping[str, tuple[Sequence[int] | None, str]]
    ) -> tuple[Sequence[str], Sequence[str]]:
        """See `huggingface_files.compare`."""
        from modelcli.providers import huggingface_files

        return huggingface_files.compare(folder, tensors)

    def own_folder(self, name: str, folder: Path) -> Path | None:
        """The folder of that name."""
        path = folder / name
        return path if not is_class_name(name) and path.is_dir() else None

    def chosen_weights(self, folder: Path) -> Path:
        """The first of the names that `from_pretrained` looks for, where the folder has several of them."""
        found = [folder / name for name in _WEIGHTS if (folder / name).exists()]
        return found[0] if len(found) > 1 else folder

    def identity(self, name: str, folder: Path) -> str | None:
        """That of the folder, and the version of timm, whose models transformers wraps."""
        path = self.own_folder(name, folder)
        if path is None:
            return None
        found = configuration.identity_of(path)
        return None if found is None else f"{found} timm {installed.version('timm')}"


PROVIDER = HuggingFace()


def is_class_name(name: str) -> bool:
    """Whether the name in a reference looks like a class of transformers: `BertForMaskedLM`."""
    return re.fullmatch(r"[A-Z]\w*For\w+|[A-Z]\w*Model", name, re.ASCII) is not None

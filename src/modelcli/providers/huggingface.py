"""Hugging Face: folders with a `config.json`, models of the Hub, and classes of transformers by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli import installed
from modelcli.errors import ModelcliError
from modelcli.providers import configuration, hub, hub_names
from modelcli.providers.base import Provider
from modelcli.providers.hub_names import HubModel
from modelcli.providers.published import PublishedModel

if TYPE_CHECKING:
    from modelcli.language.expressions import Call


class HuggingFace(Provider):
    """`runs/bert` (a folder), `hf:google-bert/bert-base-uncased@main(num_labels=3)`, `hf:LlamaConfig(...)`."""

    name = "transformers"
    live = "modelcli.live.providers.huggingface:LiveHuggingFace"
    prefix = "hf"
    extra = "hf"
    title = "a Hugging Face model (hf:ORG/NAME, or a folder with a config.json)"
    packages = ("transformers",)

    def at_hand(self) -> tuple[Sequence[PublishedModel], str]:
        """The models of the Hub in the cache that all libraries of Hugging Face share."""
        place, found = hub.cached_models()
        return [PublishedModel(name, group=files) for name, files in found], f"huggingface_hub's cache ({place})"

    def is_known_code(self, name: str) -> bool:
        """Whether it names a class of transformers. Only a user may name folders and models of the Hub."""
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
        """Return the folder of that name, or the folder in huggingface_hub's cache of a model of the Hub."""
        if (model := hub_model(name)) is not None:
            return hub.cached_folder(model)
        path = folder / name
        return path if not is_class_name(name) and path.is_dir() else None

    def excess(self, call: Call, folder: Path, modules: int) -> str | None:
        """Return whether its configuration has too many layers: see `layer_counts`."""
        from modelcli.providers import layer_counts

        path = self.own_folder(call.name, folder)
        document = {} if path is None else configuration.configuration_in(path) or {}
        return layer_counts.excess({**document, **call.kwargs}, modules)

    def is_remote(self, name: str) -> bool:
        """Whether it names a model of the Hub; a folder is named by a path: `./bert`."""
        return hub_model(name) is not None

    def pinned(self, name: str, folder: Path, *, requests: bool = True) -> str:
        """Return the name of a model of the Hub with the current commit of its revision."""
        model = hub_model(name)
        return name if model is None else str(hub.pinned(model, requests=requests))

    def downloaded(self, name: str, folder: Path) -> str:
        """Download all files of the model into the cache. Returns its name with the commit."""
        model = hub_model(name)
        return name if model is None else str(hub.downloaded(model))

    def is_partial(self, name: str, folder: Path) -> bool:
        """Whether the weights of a model of the Hub are not in the cache."""
        path = self.own_folder(name, folder) if self.is_remote(name) else None
        return path is not None and not hub.complete_weights(path)

    def chosen_weights(self, folder: Path) -> Path:
        """Return the file that `from_pretrained` prefers, if the folder has several."""
        found = [folder / name for name in hub.WEIGHTS if (folder / name).exists()]
        return found[0] if len(found) > 1 else folder

    def identity(self, name: str, folder: Path) -> str | None:
        """Return the identity of the folder or the commit, and the version of timm, whose models transformers wraps."""
        path = self.own_folder(name, folder)
        if path is None:
            return None
        found = path.name if self.is_remote(name) else configuration.identity_of(path)
        return None if found is None else f"{found} timm {installed.version('timm')}"


PROVIDER = HuggingFace()


def is_class_name(name: str) -> bool:
    """Whether the name in a reference looks like a class of transformers: `BertForMaskedLM`."""
    return re.fullmatch(r"[A-Z]\w*For\w+|[A-Z]\w*Model", name, re.ASCII) is not None


def hub_model(name: str) -> HubModel | None:
    """Return the model of the Hub that a name in a reference means; None for a class, or the path of a folder."""
    return None if is_class_name(name) else hub_names.parse_name(name)

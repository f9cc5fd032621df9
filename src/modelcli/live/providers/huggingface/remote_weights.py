"""The weights of a model of the Hub as far as their headers tell: names, shapes and dtypes, and no values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcli.checkpoints import remote
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.sharded import reading
from modelcli.errors import RequestError
from modelcli.providers import hub
from modelcli.providers.hub_names import HubModel

if TYPE_CHECKING:
    from huggingface_hub.utils import SafetensorsFileMetadata


def contents_of(model: HubModel) -> Contents | None:
    """The weights of a model by the headers of its safetensors files; None where the repository has no weights.

    Args:
        model: the model, at a commit.

    Raises RequestError for weights in another format, which have to be downloaded; FileFormatError for headers and
    indexes that are damaged; SystemFailureError where the Hub cannot be reached.
    """
    files = hub.files_of(model)
    name = next((name for name in hub.WEIGHTS if name in files), None)
    if name is None:
        return None
    if ".safetensors" not in name:
        raise RequestError(
            f"{model} on the Hub has its weights in {name} alone, whose shapes can be read only after a download",
            f"{model.download_command} downloads it; --weights none shows what the configuration alone describes",
        )
    index, shards = hub.shards_of(model, name, files)
    place = Path(model.reference)
    found = {
        shard: remote.contents_of(place / shard, _document(header), files[shard], model.download_command)
        for shard, header in hub.headers_of(model, shards).items()
    }
    if index is None:
        return found[name]
    weight_map, metadata = reading.index_of(index)
    joined = reading.joined(place / name, weight_map, metadata, found)
    return replace(joined, is_remote=True)


def _document(header: SafetensorsFileMetadata) -> Mapping[str, Any]:
    """A header as the file has it, of what huggingface_hub made of it."""
    tensors = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for name, info in header.tensors.items()
    }
    return {"__metadata__": header.metadata, **tensors}

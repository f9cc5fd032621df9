"""Folders in which each process of `torch.distributed.checkpoint` wrote its part of every tensor as safetensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from modelcli.errors import RequestError

#: What `HuggingFaceStorageWriter` calls the file of one process.
_PART = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def refuse(folder: Path, names: Sequence[str]) -> None:
    """Raise RequestError for such a folder, with what puts the parts together. `names` are those in it."""
    if parts := [name for name in names if _PART.fullmatch(name)]:
        raise RequestError(
            f"{folder} holds {len(parts)} files of torch.distributed.checkpoint's HuggingFaceStorageWriter, each with "
            "what one process wrote",
            "torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files(folder, other, "
            "num_threads=1, fqn_to_index_mapping={name: 1 for each tensor}) puts them together, and so does the writer "
            "with enable_consolidation=True",
        )

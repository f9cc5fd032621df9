"""Recognise folders of safetensors files in which each process of a training run wrote its parts of the tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from modelcli.errors import RequestError

#: The file names that `HuggingFaceStorageWriter` gives to the processes.
_PART = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def refuse(folder: Path, names: Sequence[str]) -> None:
    """Raise RequestError for such a folder, with a hint how to join the parts. `names` are the names of its files."""
    if parts := [name for name in names if _PART.fullmatch(name)]:
        raise RequestError(
            f"{folder} holds {len(parts)} files of torch.distributed.checkpoint's HuggingFaceStorageWriter, each with "
            "the parts of tensors that one process wrote",
            "join them with torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files("
            "folder, other, num_threads=1, fqn_to_index_mapping={name: 1 for each tensor}), or save with "
            "enable_consolidation=True",
        )

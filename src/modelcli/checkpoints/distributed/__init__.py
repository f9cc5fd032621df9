"""The format of `torch.distributed.checkpoint`: a folder with `.metadata` and the `.distcp` files of the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.checkpoints.distributed.names import METADATA, RANK_SUFFIX
from modelcli.checkpoints.format import Candidate, Format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.layout import FolderLayout
    from modelcli.checkpoints.plan import Plan


class DistributedCheckpoint(Format):
    """A folder of `torch.distributed.checkpoint`: read from any number of ranks, written as one rank writes it."""

    name = "dcp"
    title = "a folder of torch.distributed.checkpoint"
    label = "torch.distributed.checkpoint"
    suffixes = (RANK_SUFFIX,)
    is_folder = True
    folder_word = "dcp"
    index_pattern = METADATA
    written_index = METADATA
    holds_values = True
    has_keys = True
    unread_by_scripts = "it is a folder of torch.distributed.checkpoint"

    def is_index(self, name: str) -> bool:
        return name == METADATA

    def index_in(self, folder: Path, names: Sequence[str]) -> Path | None:
        path = folder / METADATA
        return path if METADATA in names and path.is_file() else None

    def files_in(self, folder: Path, names: set[str]) -> set[str]:
        from modelcli.checkpoints.distributed import writing

        return writing.own_files(names) if METADATA in names else set()

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.distributed import reading

        return reading.read(file.path, key)

    def folder_layout(self, plan: Plan, max_bytes: int) -> FolderLayout:
        from modelcli.checkpoints.distributed import writing

        return writing.layout(plan, max_bytes)

    def verify_folder(self, plan: Plan, layout: FolderLayout, path: Path) -> None:
        from modelcli.checkpoints.distributed import writing

        writing.verify(plan, layout, path)

    def superseded(self, folder: Path) -> set[str]:
        from modelcli.checkpoints.distributed import writing

        return writing.superseded(folder)

    def explain(self, path: Path) -> tuple[str, str] | None:
        if path.suffix != RANK_SUFFIX or not (path.parent / METADATA).exists():
            return None
        what = f"{path} is only the part of a torch.distributed.checkpoint that one rank wrote"
        return what, f"name its folder: {path.parent}/"


class SafetensorsParts(Format):
    """A folder in which each process wrote its parts of the tensors as a safetensors file, without a `.metadata`."""

    name = "dcp_safetensors"
    title = "a folder of torch.distributed.checkpoint's HuggingFaceStorageWriter"
    label = "torch.distributed.checkpoint"
    is_folder = True
    unread_by_scripts = "it is a folder of torch.distributed.checkpoint"

    def index_in(self, folder: Path, names: Sequence[str]) -> Path | None:
        if not any(name.startswith("shard-") for name in names):
            return None
        from modelcli.checkpoints.distributed import safetensors_parts

        found = safetensors_parts.files_in(names)
        return folder / found[0] if found else None

    def files_in(self, folder: Path, names: set[str]) -> set[str]:
        from modelcli.checkpoints.distributed import safetensors_parts

        return set(safetensors_parts.files_in([*names])) if any(name.startswith("shard-") for name in names) else set()

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.distributed import safetensors_parts

        return safetensors_parts.read(file.path)

"""The format of a folder of shards: several files of tensors, and an index that states which file has which tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.checkpoints.format import Candidate, Format
from modelcli.checkpoints.sharded.names import INDEX_SUFFIX, WRITTEN_INDEX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.layout import FolderLayout
    from modelcli.checkpoints.plan import Plan


class ShardedFolder(Format):
    """A folder of shards with an index, as Hugging Face's programs write it; the shards may be of any format."""

    name = "folder"
    title = "an index of shards"
    label = "safetensors"
    is_folder = True
    folder_word = "safetensors"
    keeps_order = False
    index_pattern = f"*{INDEX_SUFFIX}"
    written_index = WRITTEN_INDEX

    def is_index(self, name: str) -> bool:
        return name.endswith(INDEX_SUFFIX)

    def index_in(self, folder: Path, names: Sequence[str]) -> Path | None:
        from modelcli.checkpoints.sharded import reading

        return reading.index_in(folder, names)

    def files_in(self, folder: Path, names: set[str]) -> set[str]:
        from modelcli.checkpoints.sharded import writing

        return writing.files_in(folder, names)

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.sharded import reading

        return reading.read(file.path)

    def folder_layout(self, plan: Plan, max_bytes: int) -> FolderLayout:
        from modelcli.checkpoints.sharded import writing

        return writing.layout(plan, max_bytes)

    def verify_folder(self, plan: Plan, layout: FolderLayout, path: Path) -> None:
        from modelcli.checkpoints.sharded import writing

        writing.verify(plan, layout, path)

    def superseded(self, folder: Path) -> set[str]:
        from modelcli.checkpoints.sharded import writing

        return writing.superseded(folder)

"""Folders in which each rank saved its own part of a state dict with `torch.save`: DTensors or ShardedTensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.checkpoints.format import Candidate, Format
from modelcli.errors import RequestError
from modelcli.wording import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelcli.checkpoints.contents import Contents


class RankFiles(Format):
    """A folder with a file for each rank, such as `model_world_size_4_rank_0.pt`, which are read as one model."""

    name = "rank_files"
    title = "a folder with a file for each rank"
    label = "torch.save"
    is_folder = True
    has_keys = True
    unread_by_scripts = "it is a folder with a file for each rank"

    def index_in(self, folder: Path, names: Sequence[str]) -> Path | None:
        if not any("rank" in name for name in names):
            return None
        from modelcli.checkpoints import formats
        from modelcli.checkpoints.rank_files.names import sets_in

        sets = sets_in(names)
        if not sets or not set(names).isdisjoint(formats.whole_files()):
            return None
        if len(sets) > 1:
            raise RequestError(
                f"{folder} holds {len(sets)} sets of files of ranks: {listed([*sets], 4)}",
                "move the files of the one that you mean into a folder of their own",
            )
        (files,) = sets.values()
        return folder / files[min(files)]

    def files_in(self, folder: Path, names: set[str]) -> set[str]:
        return set()  # they may hold anything, until they are read

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.rank_files import reading

        return reading.read(file.path, key)

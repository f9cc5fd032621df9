"""The checkpoints of DeepSpeed: a folder with the states of each rank, which are read as the model in float32.

ZeRO splits the parameters over the ranks, and the float32 values are among the optimizer states (stages 1, 2 and 3).
DeepSpeed's own program `zero_to_fp32.py` puts them together in memory; here they are spans of its files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.checkpoints.format import Candidate, Format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelcli.checkpoints.contents import Contents


class DeepSpeedCheckpoint(Format):
    """The folder of a run of DeepSpeed (with its file `latest`), that of one step in it, or a universal checkpoint."""

    name = "deepspeed"
    title = "a file of a folder of DeepSpeed, which is read as one model"
    label = "DeepSpeed"
    is_folder = True
    unread_by_scripts = "it is a checkpoint folder of DeepSpeed"

    def index_in(self, folder: Path, names: Sequence[str]) -> Path | None:
        if not any(name.startswith(("latest", "global_step")) or "states" in name for name in names):
            return None
        from modelcli.checkpoints.deepspeed import folders

        return folders.index_in(folder, names)

    def files_in(self, folder: Path, names: set[str]) -> set[str]:
        from modelcli.checkpoints.deepspeed.names import LATEST, LATEST_UNIVERSAL, SCRIPT, is_states

        found = {name for name in names if is_states(name)}
        beside = {LATEST, LATEST_UNIVERSAL, SCRIPT} & names
        return found | beside if found or SCRIPT in names else set()

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.deepspeed import reading

        return reading.read(file.path)

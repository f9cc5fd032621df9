"""How the folders and files of a checkpoint of DeepSpeed are called."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from modelcli.checkpoints.torch_pickle import DEEPSPEED_SUFFIX

#: The files that name the folder of the last step of a run: one of the states, one of a universal checkpoint.
LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
#: The script that DeepSpeed writes beside the steps of a run.
SCRIPT = "zero_to_fp32.py"
#: The folder of a universal checkpoint that holds a folder for each parameter.
UNIVERSAL = "zero"
_STEP = re.compile(r"global_step\d+(_universal)?")
_SUFFIX = re.escape(DEEPSPEED_SUFFIX)
_STATES = re.compile(
    r"(?:(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,6})_)?mp_rank_(?P<mp>\d{1,6})_(?P<what>model|optim)_states"
    + _SUFFIX
)
#: Files of parts that modelcli does not join: the layers of a pipeline, and experts.
_OTHER = re.compile(r"(?P<what>layer|expert|expp?_rank)[_-].*(?:model|optim)_states" + _SUFFIX)


@dataclass
class StateFiles:
    """The files of states in a folder, by the ranks in their names.

    Attributes:
        whole: the model states that one rank wrote for all (ZeRO-1, ZeRO-2), by the rank of model parallelism.
        model: the model states of each rank of data parallelism (ZeRO-3).
        optim: the optimizer states of each rank.
        parts: the ranks of model parallelism.
        layers: the files of the layers of a pipeline.
        experts: the files of experts.
        twice: two files of the same rank, if there are such.
    """

    whole: dict[int, str] = field(default_factory=dict)
    model: dict[int, str] = field(default_factory=dict)
    optim: dict[int, str] = field(default_factory=dict)
    parts: set[int] = field(default_factory=set)
    layers: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    twice: tuple[str, str] | None = None

    @property
    def names(self) -> list[str]:
        """All of them, those that a folder is read by first."""
        return [*self.whole.values(), *self.model.values(), *self.layers, *self.experts, *self.optim.values()]


def states_in(names: Iterable[str]) -> StateFiles:
    """Return those of the files in a folder that hold states of DeepSpeed."""
    found = StateFiles()
    for name in sorted(names):
        if (match := _STATES.fullmatch(name)) is None:
            if (other := _OTHER.fullmatch(name)) is not None:
                (found.layers if other["what"] == "layer" and "_expert_" not in name else found.experts).append(name)
            continue
        part = int(match["mp"])
        found.parts.add(part)
        if match["rank"] is None and match["what"] == "model":
            files, rank = found.whole, part
        elif part or match["rank"] is None:
            continue
        else:
            files, rank = found.model if match["what"] == "model" else found.optim, int(match["rank"])
        if rank in files:
            found.twice = files[rank], name
        files[rank] = name
    return found


def is_states(name: str) -> bool:
    """Whether a file of this name holds states of DeepSpeed."""
    return bool(_STATES.fullmatch(name) or _OTHER.fullmatch(name))


def is_step(name: str) -> bool:
    """Whether DeepSpeed gives this name to the folder of a step by itself."""
    return bool(_STEP.fullmatch(name))


def home_of(folder: Path) -> Path:
    """Return the folder of the run that a folder with states belongs to, as far as the files in it tell."""
    beside = folder.parent
    return beside if any((beside / name).exists() for name in (LATEST, LATEST_UNIVERSAL, SCRIPT)) else folder

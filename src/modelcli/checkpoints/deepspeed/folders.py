"""Find the step that a folder of DeepSpeed stands for, and the file by which it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from modelcli.checkpoints.deepspeed.names import LATEST, LATEST_UNIVERSAL, is_step, states_in
from modelcli.errors import FileFormatError, RequestError, SystemFailureError
from modelcli.wording import counted, listed

#: The file `latest` holds the name of a folder.
_MOST_BYTES = 4096


def index_in(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the file of states by which a folder is read; None if it is no checkpoint of DeepSpeed.

    Args:
        folder: the folder of one step, or that of a run, whose file `latest` names the step.
        names: the names of its files and folders.

    Raises:
        RequestError: the folder holds several steps, and no `latest`.
        FileFormatError: `latest` names a folder that is not there.
    """
    from modelcli.checkpoints import formats

    if states := states_in(names).names:
        return folder / states[0]
    if not set(names).isdisjoint(formats.whole_files()):  # Hugging Face's Trainer keeps the weights beside the steps
        return None
    steps = {name: found for name in names if is_step(name) and (found := _states_of(folder / name))}
    for latest in (LATEST, LATEST_UNIVERSAL):
        if latest not in names or not (folder / latest).is_file():
            continue
        tag = _tag_in(folder / latest)
        if tag is None:
            if steps:
                raise FileFormatError.damaged(str(folder / latest), "it should hold the name of a folder beside it")
            continue
        if found := _states_of(folder / tag):
            return found
        if steps or is_step(tag):
            raise FileFormatError(
                f"{folder / latest} names {tag}, and there is no such folder with states of DeepSpeed",
                f"name one of {listed([str(folder / step) for step in steps], 6)}" if steps else "copy that folder too",
            )
    if len(steps) > 1:
        raise RequestError(
            f"{folder} holds {counted(len(steps), 'step')} of DeepSpeed and no file {LATEST}",
            f"name one of {listed([str(folder / step) for step in steps], 6)}",
        )
    return next(iter(steps.values()), None)


def _states_of(step: Path) -> Path | None:
    """Return the file of states by which the folder of a step is read; None if there is none."""
    if not step.is_dir():
        return None
    try:
        found = states_in(entry.name for entry in step.iterdir()).names
    except OSError as error:
        raise SystemFailureError(f"cannot read {step}: {error.strerror or error}") from None
    return step / found[0] if found else None


def _tag_in(latest: Path) -> str | None:
    """Return the name of the folder in a file `latest`; None if it is no name of a folder inside that of the file."""
    try:
        if latest.stat().st_size > _MOST_BYTES:
            return None
        tag = latest.read_text("utf-8").strip()
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise SystemFailureError(f"cannot read {latest}: {error.strerror or error}") from None
    parts = (*PurePosixPath(tag).parts, *PureWindowsPath(tag).parts)
    if not tag or "\0" in tag or ".." in parts or len(PureWindowsPath(tag).parts) != 1 or PureWindowsPath(tag).drive:
        return None
    try:
        inside = (latest.parent / tag).resolve().is_relative_to(latest.parent.resolve())
    except OSError:
        return None
    return tag if inside and tag != "." else None

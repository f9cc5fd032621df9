"""The names of models of the Hub: `org/name`, `gpt2`, `org/name@revision`."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from modelcli.language.quoting import quoted

_REPOSITORY = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w./+-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubModel:
    """A repository of the Hub at a revision: a branch, a tag, `refs/pr/1`, or a commit, which cannot change."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repository if self.revision == "main" else f"{self.repository}@{self.revision}"

    @property
    def reference(self) -> str:
        """The reference of the model: `hf:org/name@main`."""
        return f"hf:{self}"

    @property
    def is_commit(self) -> bool:
        return is_commit(self.revision)

    @property
    def download_command(self) -> str:
        """The command that downloads its weights."""
        return f"modelcli load {quoted(self.reference)}"


def is_commit(revision: str | None) -> bool:
    """Whether a revision is the full hash of a commit."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def parse_name(name: str) -> HubModel | None:
    """Parse the name of a model of the Hub: `org/name`, `gpt2`, `org/name@revision`; None for a path."""
    repository, at, revision = name.partition("@")
    if _REPOSITORY.fullmatch(repository) is None or ".." in repository or "--" in repository:
        return None
    if not at:
        return HubModel(repository)
    if _REVISION.fullmatch(revision) is None or ".." in revision or revision.endswith(("/", ".lock")):
        return None
    return HubModel(repository, revision)


def cached_repositories() -> list[str]:
    """Return the names of the models in huggingface_hub's cache."""
    from huggingface_hub import constants

    with contextlib.suppress(OSError):
        names = [entry.name for entry in Path(constants.HF_HUB_CACHE).iterdir()]
        return [name.removeprefix("models--").replace("--", "/") for name in names if name.startswith("models--")]
    return []

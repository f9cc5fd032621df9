"""Models of the Hub: requests and downloads, by huggingface_hub's own functions.

Showing a model reads its configuration and the headers of its weights. Values are downloaded into huggingface_hub's
cache, and from then on the model is a folder there. Only the files that this module names are requested: no Python
files, no subfolders, and no weights in a second format.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli import installed
from modelcli.errors import FileFormatError, RequestError
from modelcli.files.open_folder import read_regular
from modelcli.language.quoting import quoted
from modelcli.providers import configuration, hub_errors
from modelcli.providers.hub_names import HubModel, is_commit

if TYPE_CHECKING:
    from huggingface_hub.utils import SafetensorsFileMetadata

#: The files of weights, or their indexes, in the order in which `from_pretrained` looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: The suffix of an index of shards.
INDEX = ".index.json"
#: The suffixes of other files that belong to a model: tokenizer, generation, templates, the model card.
_OTHER_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm", ".vocab", ".md")
#: The largest size of an index in bytes. The index of the largest models, with 200,000 keys, has a fifth of this.
_MAX_INDEX_BYTES = 100_000_000
#: How many headers are requested at the same time.
_AT_A_TIME = 8


def pinned(model: HubModel, *, requests: bool = True) -> HubModel:
    """Find the current commit of a model's revision, and download the configuration into the cache.

    A commit whose configuration is in the cache needs no request. If the Hub cannot be reached, the cached commit of
    the revision is used, as huggingface_hub does.

    Args:
        model: the model.
        requests: whether the Hub may be reached. Otherwise only the cache is used, and a model that is not in it is
            returned unchanged.

    Returns:
        The model at this commit.

    Raises:
        RequestError: there is no such model.
        SystemFailureError: the Hub cannot be reached.
        FileFormatError: the configuration is too large.
    """
    cached = cached_folder(model)
    if cached is not None and (model.is_commit or not requests):
        return replace(model, revision=cached.name)
    if not requests:
        return model
    _require_installed()
    from huggingface_hub import hf_hub_download

    with hub_errors.converted(model):
        try:
            commit, nbytes = _commit_and_size(model)
        except Exception as error:
            if cached is not None and hub_errors.is_unreachable(error):
                return replace(model, revision=cached.name)
            if hub_errors.is_missing_file(error):
                raise _without_configuration(model) from None
            raise
        if nbytes is not None and nbytes > configuration.MAX_BYTES:
            raise FileFormatError(
                f"{configuration.NAME} of {model} has {nbytes:,} bytes; a configuration has at most "
                f"{configuration.MAX_BYTES:,}"
            )
        if cached is not None and cached.name == commit:
            return replace(model, revision=commit)
        with _without_bars():
            path = Path(hf_hub_download(model.repository, configuration.NAME, revision=model.revision))
    return replace(model, revision=path.parent.name)


def _commit_and_size(model: HubModel) -> tuple[str, int | None]:
    """Return the commit of a revision, and the size of the configuration there, by one request."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import FileMetadataError

    url = hf_hub_url(model.repository, configuration.NAME, revision=model.revision)
    found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if found.commit_hash is None or not is_commit(found.commit_hash):
        raise FileMetadataError(f"the answer names no commit, but {found.commit_hash!r}")
    return found.commit_hash, found.size


def cached_folder(model: HubModel) -> Path | None:
    """Return the folder in huggingface_hub's cache with the files of a revision; None if it has no configuration."""
    if installed.folder("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repository, configuration.NAME, revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def cached_models() -> tuple[Path, list[tuple[str, str]]]:
    """The models in huggingface_hub's cache that have a configuration.

    Returns:
        The folder of the cache; and for each model its name and what is there: `weights`, or `configuration` where the
        values would have to be downloaded.

    Raises RequestError where huggingface_hub is not installed.
    """
    _require_installed()
    from huggingface_hub import constants, scan_cache_dir

    place, found = Path(constants.HF_HUB_CACHE), []
    for repository in scan_cache_dir(place).repos if place.is_dir() else ():
        folders = [each.snapshot_path for each in repository.revisions]
        configured = [folder for folder in folders if (folder / configuration.NAME).is_file()]
        if repository.repo_type == "model" and configured:
            has_weights = any(complete_weights(folder) for folder in configured)
            found.append((repository.repo_id, "weights" if has_weights else "configuration"))
    return place, sorted(found)


def complete_weights(folder: Path) -> list[str]:
    """Return the files of weights in a cached folder, and the indexes whose shards have all been downloaded."""
    return [name for name in WEIGHTS if (folder / name).is_file() and _has_shards(folder / name)]


def _has_shards(path: Path) -> bool:
    """Whether all shards that an index names are beside it; True for a file that is not an index."""
    if not path.name.endswith(INDEX):
        return True
    try:
        return all((path.parent / file).is_file() for file in shards_in(path))
    except (FileFormatError, OSError):
        return True  # reading the index will report the fault


def shards_in(index: Path) -> list[str]:
    """Return the files that an index names. Raises FileFormatError for names outside its folder."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {_MAX_INDEX_BYTES:,} bytes")
        files = dict.fromkeys(json.loads(read_regular(index))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{index.name} is not a valid index of shards: {error}") from None
    for file in files:
        if not isinstance(file, str) or not _is_plain(file):
            raise FileFormatError(f"{index.name} names the file {file!r}, which is outside its folder")
    return list(files)


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file directly in the folder."""
    return name.isprintable() and not name.startswith(".") and not re.search(r'[/\\:*?"<>|]', name) and name != ""


def files_of(model: HubModel) -> dict[str, int | None]:
    """Return the files of a repository at a commit, without subfolders, with their sizes in bytes, by one request."""
    _require_installed()
    from huggingface_hub import HfApi, constants

    with hub_errors.converted(model):
        found = HfApi().model_info(
            model.repository, revision=model.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    return {file.rfilename: file.size for file in found.siblings or () if _is_plain(file.rfilename)}


def shards_of(model: HubModel, name: str, files: Mapping[str, int | None]) -> tuple[Path | None, list[str]]:
    """Return the files of weights of a name: the file itself, or the shards of an index, which is downloaded.

    Args:
        model: the model, at a commit.
        name: one of `WEIGHTS`.
        files: the files of the repository with their sizes.

    Returns:
        The path of the index in the cache, or None if the name is not that of an index; and the names of the files.

    Raises:
        FileFormatError: the index names files that the repository does not have.
    """
    if not name.endswith(INDEX):
        return None, [name]
    if (nbytes := files[name]) is not None and nbytes > _MAX_INDEX_BYTES:
        raise FileFormatError(f"{name} of {model} has {nbytes:,} bytes; an index has at most {_MAX_INDEX_BYTES:,}")
    from huggingface_hub import hf_hub_download

    with hub_errors.converted(model), _without_bars():
        index = Path(hf_hub_download(model.repository, name, revision=model.revision))
    shards = shards_in(index)
    if missing := [shard for shard in shards if shard not in files]:
        raise FileFormatError(f"{name} of {model} names the file {missing[0]}, which the repository does not have")
    return index, shards


def headers_of(model: HubModel, shards: Sequence[str]) -> dict[str, SafetensorsFileMetadata]:
    """Return the headers of safetensors files, by one request for each, or two if a header is longer than 100 kB."""
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    asked = functools.partial(HfApi().parse_safetensors_file_metadata, model.repository, revision=model.revision)
    with hub_errors.converted(model), ThreadPoolExecutor(_AT_A_TIME) as pool:
        return dict(zip(shards, pool.map(asked, shards), strict=True))


def downloaded(model: HubModel) -> HubModel:
    """Download a model's weights, and the other files that belong to it, into the cache.

    Weights that are in the cache are not requested again if the user forbids requests (`HF_HUB_OFFLINE=1`), or for a
    commit.

    Returns:
        The model at its commit.

    Raises:
        SystemFailureError: the disk is full. Other errors are those of `pinned`.
    """
    found = pinned(model)
    cached = cached_folder(found)
    is_enough = cached is not None and bool(complete_weights(cached))
    if is_enough and (model.is_commit or is_offline()):
        return found
    from huggingface_hub import snapshot_download

    try:
        files = files_of(found)
    except Exception as error:
        if is_enough and hub_errors.is_unreachable(error):
            return found
        raise
    wanted = _wanted(found, files)
    if cached is not None and all((cached / name).is_file() for name in wanted):
        return found
    with hub_errors.converted(found), _without_bars(always=False):
        patterns = [re.sub(r"([\[\]*?])", r"[\1]", name) for name in wanted]
        snapshot_download(found.repository, revision=found.revision, allow_patterns=patterns)
    return found


def _wanted(model: HubModel, files: Mapping[str, int | None]) -> list[str]:
    """Return the files to download: the weights in one format, and the small files that belong to a model."""
    wanted = [name for name in files if name.endswith(_OTHER_FILES) and not name.endswith(INDEX)]
    chosen = next((name for name in WEIGHTS if name in files), None)
    if chosen is not None:
        index, shards = shards_of(model, chosen, files)
        wanted += shards if index is None else [chosen, *shards]
    return wanted


def is_offline() -> bool:
    """Whether the user forbids requests by `HF_HUB_OFFLINE`."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


#: The kind of a repository without a configuration, by a file in it.
_OTHER_KINDS = (
    ("adapter_config.json", "an adapter for another model, in peft's format", None),
    ("model_index.json", "a pipeline of several models, in diffusers' format", None),
    (".gguf", "a model in the GGUF format, for llama.cpp", "the repository that it was converted from may have one"),
    ("modules.json", "a pipeline of sentence-transformers", None),
    ("open_clip_config.json", "a model of open_clip", None),
)


def _without_configuration(model: HubModel) -> RequestError:
    """Return the error for a repository that is not a model of transformers, which says what it is."""
    names: Collection[str] = ()
    with contextlib.suppress(Exception):
        names = files_of(model)
    what = f"{model} on the Hub has no {configuration.NAME}"
    for ending, kind, hint in _OTHER_KINDS:
        if any(name.endswith(ending) for name in names):
            return RequestError(f"{what}: it is {kind}", hint)
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".ckpt"))]
    if weights:
        fetch = f"hf download {model.repository} {quoted(weights[0])} --local-dir ."
        return RequestError(what, f"{fetch} downloads a file of weights, which modelcli takes by its path")
    return RequestError(what, "modelcli takes repositories that transformers' from_pretrained loads")


def _require_installed() -> None:
    """Raise RequestError if huggingface_hub is not installed."""
    if installed.folder("huggingface_hub") is None:
        raise RequestError(
            "huggingface_hub is not installed, and models of the Hub need it", "pip install 'modelcli[hf]'"
        )


@contextlib.contextmanager
def _without_bars(*, always: bool = True) -> Iterator[None]:
    """Turn off huggingface_hub's progress bars in the block: `always`, or only if standard error is not a terminal."""
    import warnings

    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    is_quiet = always or not sys.stderr.isatty()
    if not is_quiet or are_progress_bars_disabled() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()

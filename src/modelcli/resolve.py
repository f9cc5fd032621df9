"""Find out what a reference means: a provider's model, a Python object, or a file or folder.

The rules are those of section 2 of the contract. The providers say which names exist. This module opens no checkpoint
and runs no user's code.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from modelcli import providers
from modelcli.checkpoints import formats, limits
from modelcli.errors import ModelcliError, RequestError, SystemFailureError, UnsafeError
from modelcli.language.quoting import quoted
from modelcli.language.references import (
    MAX_PATH,
    CheckpointFile,
    NamedModel,
    PythonObject,
    Reference,
    Source,
    exists,
    missing_file,
)
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.checkpoints import Contents
    from modelcli.checkpoints.record import Record
    from modelcli.providers.base import Provider


def reference_of(source: Source) -> Reference:
    """Return the reference of a source's model. Relative paths start at the source's folder. Raises as `parse` does.

    A folder that holds a library's model counts as a checkpoint if the user names another architecture (`--arch`) or
    wants only the keys, and if its weights are quantized: the library's class has no place for their scales.
    """
    found = parse(source.model, source.folder)
    if source.arch is None and not source.bare_keys:
        path = _quantized_weights(found, source)
    else:
        path = _folder_named(found, source)
    return found if path is None else CheckpointFile(path)


def quantized_folder(source: Source) -> Path | None:
    """Return the folder of a library's model whose weights are quantized, so that only its keys are opened.

    None for any other source, and if the user wants the keys alone.
    """
    if source.arch is not None or source.bare_keys:
        return None
    found = parse(source.model, source.folder)
    if isinstance(found, CheckpointFile):
        return found.path if _is_quantized_folder(found.path) else None
    return None if _quantized_weights(found, source) is None else own_folder(found, source)


def _is_quantized_folder(path: Path) -> bool:
    """Whether a folder holds quantized weights of a library that is not installed, so that it is a plain checkpoint."""
    if not path.is_dir():
        return False
    from modelcli.providers import configuration, quantization

    is_described = quantization.beside(path) is not None
    if not is_described or not any(known.recognises(path) for known in providers.with_prefix()):
        return False
    return _holds_packed(path, configuration.identity_of(path))


def _quantized_weights(reference: Reference, source: Source) -> Path | None:
    """Return the file or folder with the quantized weights of a library's model; None if they are not quantized."""
    if not isinstance(reference, NamedModel) or reference.prefix is None or source.weights is not None:
        return None
    if reference.call.args or reference.call.kwargs or (folder := own_folder(reference, source)) is None:
        return None
    from modelcli.providers import configuration, quantization  # most models have no folder

    if quantization.beside(folder) is None or (weights := own_weights(reference, source)) is None:
        return None
    return weights if _holds_packed(weights, configuration.identity_of(folder)) else None


@functools.cache
def _holds_packed(weights: Path, _identity: str | None) -> bool:
    """Whether a checkpoint has weights of narrow elements. `_identity` is another one if its files have changed."""
    from modelcli import checkpoints
    from modelcli.model import scaled_weights

    try:
        tensors = checkpoints.read(weights).tensors.values()
    except ModelcliError:  # the command that opens the model says what is wrong
        return False
    return any(scaled_weights.is_packed(tensor.dtype, len(tensor.shape)) for tensor in tensors)


def _folder_named(reference: Reference, source: Source) -> Path | None:
    """Return the folder with a library's model if a source names it by a path without a prefix; otherwise None."""
    is_model = isinstance(reference, NamedModel) and reference.prefix is not None
    return source.folder / source.model if is_model and is_folder(source.model, source.folder) else None


def is_folder(text: str, folder: Path) -> bool:
    """Whether the text of a reference is the path of a folder, relative to `folder`."""
    path = folder / text
    return (
        len(text) < MAX_PATH and exists(path) and path.is_dir() and not (_is_bare_word(text) and _is_known_word(text))
    )


def keys_alone_note(path: Path, source: Source) -> str | None:
    """Return a note if only the keys of a library's model can be shown: see `unknown_model_note`; else None.

    Args:
        path: the checkpoint that the source names.
        source: how the user named the model.
    """
    if source.bare_keys:
        return None
    if (folder := quantized_folder(source)) is None:
        return unknown_model_note(path)
    from modelcli.providers import quantization

    method = quantization.method_in(quantization.beside(folder)) or "an unnamed method"
    return (
        f"the weights in {folder} are quantized ({method}), and the class of its configuration has no place for their "
        "scales: the keys of the files are shown"
    )


def unknown_model_note(path: Path) -> str | None:
    """Return a note for a folder that seems to hold a library's model, but of which only the keys can be shown.

    The reason is that its configuration cannot be read, or that the library is not installed. None for other paths.
    """
    if not path.is_dir():
        return None
    from modelcli.providers import configuration  # not needed for a file

    try:
        configuration.configuration_in(path)
    except ModelcliError as error:
        return f"the keys of the files are shown, because the configuration cannot be read: {error.message}"
    missing = (known for known in providers.with_prefix() if not known.is_installed)
    provider = next((known for known in missing if known.recognises(path)), None)
    if provider is None:
        return None
    return (
        f"{path} holds a model of {provider.name}, which is not installed, so the keys of its files are shown: "
        f"{provider.install_command}"
    )


def parse_recorded(text: str, folder: Path, *, trust: bool) -> Reference:
    """Parse the reference in a record.

    Args:
        text: the reference.
        folder: the folder of the file with the record.
        trust: whether a path of a Python file in the reference may be looked up, relative to `folder`. Without it, no
            path is looked up: a path on another machine would send a request there.

    Raises:
        RequestError: the text is not a reference.
        UnsafeError: the reference names a checkpoint, or Python code outside the folder.
    """
    reference = _parsed(text, folder, look=False)
    if isinstance(reference, CheckpointFile):
        raise UnsafeError(f"a record may not name another file as its architecture, and it names {text}", _ARCH)
    if isinstance(reference, PythonObject) and reference.file is not None:
        if _is_absolute(reference.source):
            raise UnsafeError(f"a record may not name code outside its folder, and it names {reference.source}", _ARCH)
        if trust:
            return parse(text, folder)
    return reference


def record_runs_known_code(record: Record) -> bool:
    """Whether a record names only classes and models of known libraries."""
    return _is_known_code(record.reference) and _edits_place_known_code(record)


def _is_known_code(text: str | None) -> bool:
    """Whether the reference of a record names a model of a known library."""
    from modelcli.providers import known_code

    if text is None:
        return False
    if _is_bare_word(text):
        return known_code.is_known_name(text)
    try:
        reference = parse_recorded(text, Path(), trust=False)
    except ModelcliError:
        return False
    return isinstance(reference, NamedModel) and known_code.runs_known_code(reference)


def _edits_place_known_code(record: Record) -> bool:
    """Whether the edits of a record place only classes of known libraries."""
    if not any(re.search(_PACKAGE_IN_EDIT, line) for line in record.edits):
        return True  # the edits name classes without a package, which always belong to known libraries
    try:
        parsed = record.parsed_edits()
    except RequestError:
        return False
    from modelcli.providers import known_code

    return all(known_code.names_known_code(call) for edit in parsed for call in edit.modules())


#: Matches every edit that places a class outside the known libraries. Such an edit has a name behind a dot or a colon
#: that is called or that comes after the target, or quotes or backslashes that may hide such a name.
_PACKAGE_IN_EDIT = r"""[.:]\s*[^\W\d]\w*\s*\(|^\s*\S+\s+\S+\s.*[.:][^\W\d]|["'\\]"""


def disagreement(record: Record, contents: Contents, *, to_build: bool = False) -> str | None:
    """Return why the record of a file cannot be trusted, or None: see `checkpoints.record.disagreement`.

    Args:
        record: the record of the file.
        contents: the contents of the file.
        to_build: whether the caller will carry out the record's edits, so that all of them must be valid.
    """
    if to_build and (why := record.unreadable_edit()) is not None:
        return why
    from modelcli.checkpoints import record as records

    return records.disagreement(record, contents.infos(), known_code=record_runs_known_code(record))


_ARCH = "--arch names the architecture instead"


def _is_absolute(path: str) -> bool:
    """Whether a path starts at a root, at a drive or at another machine, on any operating system."""
    return path.startswith(("/", "\\")) or bool(PureWindowsPath(path).drive)


def parse(text: str, folder: Path | None = None) -> Reference:
    """Parse a reference. The first of these that matches decides what it means:

    1. a bare word that a provider knows, or that is not the name of a file;
    2. an existing path;
    3. `file.py:Class(...)`;
    4. `PREFIX:NAME(...)` with the prefix of a provider (a Python module of that name can be written as
       `PREFIX.py:Class(...)`);
    5. `module:name`;
    6. a builder or a module expression.

    Args:
        text: the reference.
        folder: relative paths start here; None for the current folder.

    Raises:
        RequestError: the text is none of these.
        SystemFailureError: the provider of a prefix cannot be loaded.
    """
    return _parsed(text, folder or Path(), look=True)


def _parsed(text: str, folder: Path, *, look: bool) -> Reference:
    """Parse a reference as `parse` does.

    Without `look`, no path is looked up: the text alone decides, and a path with a checkpoint's suffix is a checkpoint.
    """
    if not text.strip():
        raise RequestError("an empty model reference", "name one: alexnet, nets.py:Net(3,2), best.pth")
    path = folder / text
    if _is_bare_word(text) and (not look or not exists(path) or _is_known_word(text)):
        return _named(text)
    if look and "\0" not in text and len(text) < MAX_PATH and exists(path):
        if path.suffix == ".py" and path.is_file():
            raise _names_no_class(text, path)
        return _recognised(text, path) or CheckpointFile(path)
    if (split := _split_object(text, folder, look=look)) is not None:
        return _library_class(*split) or _prefixed(*split) or _python_object(*split, folder, look=look)
    if not look and (formats.has_known_suffix(text) or re.search(r"[/\\]", text.partition("(")[0])):
        return CheckpointFile(path)
    if formats.has_known_suffix(text) or text.endswith(("/", os.sep, ".toml")):
        raise missing_file(path, text)
    if Path(text).suffix == ".py" and "(" not in text:
        raise missing_file(path, text)
    if re.search(r"[/\\]", text.partition("(")[0]):
        raise missing_file(path, text)
    if re.fullmatch(r"[\w.+-]+", text) and not re.fullmatch(r"[A-Za-z_][\w.]*", text, re.ASCII):
        return _named(text)  # `bert-base-uncased` is not an expression; the provider will report the unknown name
    from modelcli.language import expressions

    call = expressions.parse(text)
    # `(module:build(3))` is a Python object in parentheses.
    return _parsed(str(call), folder, look=look) if ":" in call.name else NamedModel(call)


def _named(name: str) -> NamedModel:
    """Return the reference of a model's name without arguments."""
    from modelcli.language.expressions import Call

    return NamedModel(Call(name))


def _recognised(text: str, path: Path) -> NamedModel | None:
    """Return the model that a provider recognises in a folder; None for a plain checkpoint.

    Only the built-in providers with a prefix, and providers of other packages that are already loaded, are asked.
    """
    if not path.is_dir():
        return None
    from modelcli.language.expressions import Call

    installed = (known for known in providers.with_prefix() if known.is_installed)
    provider = next((known for known in installed if known.recognises(path)), None)
    if provider is None:
        return None
    # With `./` in front, the provider cannot mistake the folder for a model of that name: `./org/name`, `./resnet50`.
    is_name = provider.is_remote(text) or (_is_bare_word(text) and provider.own_folder(text, path.parent) is None)
    return NamedModel(Call(f"./{text}" if is_name else text), provider.prefix)


def pinned(source: Source, *, requests: bool = True) -> Source:
    """Return the source with each remote model pinned to a commit, so that it cannot change: see `Provider.pinned`."""

    def name_of(provider: Provider, name: str) -> str:
        return provider.pinned(name, source.folder, requests=requests)

    arch = None if source.arch is None else _renamed(source.arch, source.folder, name_of)
    found = replace(source, model=_renamed(source.model, source.folder, name_of), arch=arch)
    if requests:
        require_buildable(found)
    return found


def require_buildable(source: Source) -> None:
    """Raise UnsafeError for a model that is far too large to build: see `Provider.excess`."""
    if source.bare_keys and source.arch is None:
        return
    reference = reference_of(source) if source.arch is None else parse(source.arch, source.folder)
    if not isinstance(reference, NamedModel) or (provider := providers.by_prefix(reference.prefix or "")) is None:
        return
    why = provider.excess(reference.call, source.folder, limits.MODULES.value)
    if why is not None:
        raise limits.too_many_modules(reference.call.name, why)


def downloaded(source: Source) -> Source:
    """Download the values of a source's model and return the source as `pinned` does: see `Provider.downloaded`.

    If `--weights` says that the values come from elsewhere, nothing is downloaded.
    """
    if source.weights == "none" or (
        source.weights is not None and names_a_file(source.weights, source.folder, source.model)
    ):
        return pinned(source)

    def name_of(provider: Provider, name: str) -> str:
        return provider.downloaded(name, source.folder)

    return pinned(replace(source, model=_renamed(source.model, source.folder, name_of)))


def _renamed(text: str, folder: Path, name_of: Callable[[Provider, str], str]) -> str:
    """Return a reference with the name of its model replaced by what `name_of` returns.

    References without a provider's prefix are returned unchanged.
    """
    if (prefix := providers.prefix_of(text)) is None or not _is_prefix(prefix):
        return text
    reference = parse(text, folder)
    provider = None if not isinstance(reference, NamedModel) else providers.by_prefix(reference.prefix or "")
    if provider is None:
        return text
    assert isinstance(reference, NamedModel)
    try:
        name = name_of(provider, reference.call.name)
    except (RequestError, SystemFailureError) as error:
        if (own := _hidden_folder(text, folder)) is not None and _is_readable(f"./{own}", folder):
            hint = f"-m {quoted(f'./{own}')} names the folder of that name on this machine"
            error.hint = f"{hint}; {error.hint}" if error.hint else hint
        raise
    if name == reference.call.name:
        return text
    return str(replace(reference, call=replace(reference.call, name=name)))


def _is_readable(text: str, folder: Path) -> bool:
    """Whether a path is that of a library's model, with weights whose headers can be read if it has any, or a file."""
    from modelcli import checkpoints

    try:
        reference = parse(text, folder)
        path = folder / text
        if isinstance(reference, NamedModel):
            weights = own_weights(reference, Source(text, folder=folder))
            if weights is None:
                return True
            path = weights
        checkpoints.read(path)
    except ModelcliError:
        return False
    return True


def require_downloaded(reference: Reference, source: Source) -> None:
    """Raise RequestError for a model whose files have not been downloaded yet."""
    if not isinstance(reference, NamedModel) or reference.prefix is None:
        return
    provider, name = providers.by_prefix(reference.prefix), reference.call.name
    if provider is None or not provider.is_remote(name):
        return
    if provider.own_folder(name, source.folder) is None or provider.is_partial(name, source.folder):
        raise RequestError(
            f"the files of {reference} are not on this machine",
            f"modelcli load {quoted(str(reference))} downloads them",
        )


def own_weights(reference: Reference, source: Source) -> Path | None:
    """Return the folder or file with the weights that are the default of a reference's model.

    None if the model has none, or if `--weights none` asks for random values instead.
    """
    folder = None if source.weights == "none" else own_folder(reference, source)
    if folder is None or not formats.holds_weights(folder):
        return None
    assert isinstance(reference, NamedModel)
    provider = None if reference.prefix is None else providers.by_prefix(reference.prefix)
    if provider is None:
        return folder
    return None if provider.is_partial(reference.call.name, source.folder) else provider.chosen_weights(folder)


def own_folder(reference: Reference, source: Source) -> Path | None:
    """Return the folder with the files of a provider's model; None for a model that has no folder."""
    if not isinstance(reference, NamedModel) or reference.prefix is None:
        return None
    provider = providers.by_prefix(reference.prefix)
    return None if provider is None else provider.own_folder(reference.call.name, source.folder)


def _is_bare_word(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII) is not None


@functools.cache
def _is_known_word(word: str) -> bool:
    """Whether a bare word is the name of a provider's model, so that a file of that name must be written as a path.

    This reads the libraries' sources, which takes about 30 ms, so it is called only if there is such a file.
    """
    return any(word in provider.bare_words() for provider in providers.built_in())


def hidden_file_note(text: str, folder: Path) -> str | None:
    """Return a note if a reference means a provider's model, and a file or folder of the same name exists."""
    prefix, colon, _ = text.partition(":")
    if colon and _is_prefix(prefix) and exists(folder / f"{prefix}.py"):
        return f"{text} means a model of the provider {prefix}; write {prefix}.py:... to name the file {prefix}.py"
    if colon and (folder_name := _hidden_folder(text, folder)) is not None:
        return f"{text} means a model of the provider {prefix}; write ./{folder_name} to name the folder {folder_name}"
    if not _is_bare_word(text) or not exists(folder / text) or not _is_known_word(text):
        return None
    what = "folder" if (folder / text).is_dir() else "file"
    return f"{text} means the model of that name; write ./{text} to name the {what} {text}"


def _hidden_folder(text: str, folder: Path) -> str | None:
    """Return the name of a folder that has the same name as a remote model; None if there is none."""
    prefix, name = providers.prefix_of(text), text.partition(":")[2].partition("(")[0].partition("@")[0]
    if prefix is None or not _is_prefix(prefix) or not name or not (folder / name).is_dir():
        return None
    provider = providers.by_prefix(prefix)
    return name if provider is not None and provider.is_remote(name) else None


def _split_object(text: str, folder: Path, *, look: bool) -> tuple[str, str] | None:
    """Split `nets.py:Net(3)` at its colon; None if there is none. Colons of drives and in arguments do not count.

    If a part of the text is an existing Python file, the text is split there, because the names of folders may contain
    colons and parentheses.
    """
    for match in re.finditer(r"\.py:", text[:MAX_PATH]):
        if not look or exists(folder / text[: match.end() - 1]):
            return text[: match.end() - 1], text[match.end() :]
    start = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    colon = text.find(":", start)
    parenthesis = text.find("(")
    if colon < 0 or 0 <= parenthesis < colon:
        return None
    return text[:colon], text[colon + 1 :]


def _library_class(source: str, target: str) -> NamedModel | None:
    """Return a class of a provider's own library that is written with a colon: `torch.nn:Linear(2,3)`."""
    from modelcli.language import expressions
    from modelcli.language.expressions import Call

    package = source.partition(".")[0]
    if not any(package in provider.packages and provider.owns(source) for provider in providers.built_in()):
        return None
    name = target.partition("(")[0].strip()
    if not re.fullmatch(r"[A-Z]\w*", name, re.ASCII):  # names of functions begin with a small letter
        return None
    call = expressions.parse(target)
    return NamedModel(Call(f"{source}.{name}", call.args, call.kwargs))


def _prefixed(source: str, target: str) -> NamedModel | None:
    """Return the model of a provider with a prefix, `timm:resnet50(num_classes=10)`; None for another prefix."""
    if not _is_prefix(source):
        return None
    provider = providers.by_prefix(source)
    return None if provider is None else NamedModel(provider.parse(target), source)


def _is_prefix(text: str) -> bool:
    """Whether a provider has this prefix. Entry points are read unless it is the prefix of a built-in provider."""
    return re.fullmatch(r"[A-Za-z][\w-]*", text, re.ASCII) is not None and text in providers.prefixes()


def _python_object(source: str, target: str, folder: Path, *, look: bool) -> PythonObject:
    from modelcli.language import expressions

    call = None
    if "(" in target:
        call = expressions.parse(target)
        name = call.name
    else:
        name = target.strip()
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, re.ASCII):
        raise RequestError(
            f"{name!r} after the colon of {source}: is not a name",
            "write nets.py:Net(3,2) or package.module:build()",
        )
    if source.endswith(".py"):
        path = folder / source
        if look and not exists(path):
            raise missing_file(path, source)
        return PythonObject(source, name, call, path)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", source, re.ASCII):
        raise RequestError(
            f"{source!r} before the colon is neither a Python file nor an importable module",
            "write nets.py:Net(3,2) or package.module:build()",
        )
    return PythonObject(source, name, call)


def names_a_file(text: str, folder: Path, model: str = "") -> bool:
    """Whether the value of `--weights` is a path, and not the name of a provider's pretrained weights.

    It is a path if it has a separator or the suffix of a checkpoint, or if a file or folder of that name exists and no
    weights have this name.

    Args:
        text: the value.
        folder: relative paths start here.
        model: the reference of the model. Its prefix decides which provider's names count.
    """
    if formats.has_known_suffix(text) or "/" in text or "\\" in text:
        return True
    return text not in ("none", "DEFAULT") and exists(folder / text) and not _names_weights(text, model)


def _names_weights(text: str, model: str) -> bool:
    prefix = providers.prefix_of(model)
    provider = None if prefix is None else providers.by_prefix(prefix)
    asked = providers.built_in() if provider is None else (provider,)
    return any(text in provider.weights_names() for provider in asked)


def names_a_model(text: str) -> bool:
    """Whether an argument that should name a recipe names a model instead: a checkpoint, Python code or a builder."""
    path = Path(text)
    if len(text) < MAX_PATH and "\0" not in text and exists(path):
        return path.is_dir() or formats.has_known_suffix(path) or path.suffix == ".py"
    try:
        return path.suffix != ".toml" and not isinstance(parse(text), CheckpointFile)
    except (RequestError, SystemFailureError):
        return formats.has_known_suffix(path)


def _names_no_class(text: str, path: Path) -> RequestError:
    """Return the error for `nets.py` without a class. It lists the classes in the file, which is parsed, not run."""
    import ast
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return RequestError(f"{text} is not valid Python: {error}")
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if not names:
        return RequestError(f"{text} names no class, and the file has none", f"write {text}:build(...)")
    classes = listed([f"{text}:{name}" for name in names], 12)
    return RequestError(f"{text} names a file, not a class in it", f"classes in it: {classes}")

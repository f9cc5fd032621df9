"""timm: `timm:resnet50.a1_in1k(num_classes=10)`, and folders in timm's layout on the Hub.

Names and tags are read from timm's sources, which takes a tenth of a second; importing timm takes seconds. Tags that a
source computes are not found: the names are used for completion, and timm itself decides which names are valid.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli import installed
from modelcli.errors import ModelcliError
from modelcli.providers import configuration
from modelcli.providers.base import Provider

if TYPE_CHECKING:
    from modelcli.language.expressions import Call

#: The packages of timm's models, and of the modules in them.
PACKAGES = ("timm.models", "timm.layers")
#: The names of files of weights, in the order in which timm looks for them in a folder.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
#: Every model of timm has more tensors, and more names in their keys. AlexNet has 16 tensors.
_FEWEST_KEYS, _FEWEST_WORDS = 20, 3


class Timm(Provider):
    """`timm:resnet50`, `timm:resnet50.a1_in1k(in_chans=1)`, a folder with a `config.json` of timm."""

    name = "timm"
    live = "modelcli.live.providers.timm:LiveTimm"
    prefix = "timm"
    extra = "timm"
    has_names = True
    has_many_models = True
    title = "a timm model (timm:resnet50)"
    packages = ("timm",)
    script_names = frozenset({"timm"})

    def names(self) -> Sequence[str]:
        """Return the names of `timm.list_models()`: the functions that its sources register."""
        return tuple(sorted(name for source in _sources().values() for name in source.models))

    def full_names(self) -> Sequence[str]:
        """Return the names, and each name with the tags of its pretrained weights: `resnet50.a1_in1k`."""
        return (*self.names(), *(f"{name}.{tag}" for name, tag in self._tagged()))

    def weights_names(self) -> Sequence[str]:
        """Return all tags, each once."""
        return tuple(dict.fromkeys(tag for _, tag in self._tagged()))

    def weights_names_of(self, name: str) -> Sequence[str]:
        """`DEFAULT` and the tags of a model. Only the file that defines it is searched."""
        architecture = name.partition(".")[0]
        mark = f"{architecture}.".encode()
        texts = (data.decode() for path in _paths() if mark in (data := path.read_bytes()))
        tags = [tag for text in texts for known, tag in _TAGGED.findall(text) if known == architecture]
        return ("DEFAULT", *dict.fromkeys(tags)) if tags else ()

    def _tagged(self) -> Iterator[tuple[str, str]]:
        for source in _sources().values():
            yield from source.tagged

    def owns(self, package: str) -> bool:
        """Whether a package is `timm.layers`, `timm.models` or a module in one of them."""
        return package in PACKAGES or package.startswith(tuple(f"{own}." for own in PACKAGES))

    def is_known_code(self, name: str) -> bool:
        """Whether it names one of timm's models, with or without a tag. Only a user may name folders."""
        return is_model_name(name)

    def recognises(self, folder: Path) -> bool:
        """Whether its configuration has an `architecture`, like timm's configurations."""
        try:
            document = configuration.configuration_in(folder)
        except ModelcliError:
            return False
        return (
            document is not None
            and isinstance(document.get("architecture"), str)
            and "model_type" not in document  # transformers wraps models of timm in its own
            and self.is_installed
        )

    def own_folder(self, name: str, folder: Path) -> Path | None:
        """Return the folder of that name; None for the name of a model. `./resnet50` always means a folder."""
        path = folder / name
        return path if path.is_dir() and not is_model_name(name) else None

    def excess(self, call: Call, folder: Path, modules: int) -> str | None:
        """Return why its arguments, or those of its configuration, ask for too many layers: see `layer_counts`."""
        from modelcli.providers import layer_counts

        path = self.own_folder(call.name, folder)
        document = {} if path is None else configuration.configuration_in(path) or {}
        arguments = document.get("model_args")
        return layer_counts.excess({**(arguments if isinstance(arguments, dict) else {}), **call.kwargs}, modules)

    def chosen_weights(self, folder: Path) -> Path:
        """Return the file that timm prefers, if the folder has several."""
        found = [folder / name for name in _WEIGHTS if (folder / name).exists()]
        return found[0] if len(found) > 1 else folder

    def identity(self, name: str, folder: Path) -> str | None:
        """Return the identity of the folder with its configuration."""
        path = self.own_folder(name, folder)
        return None if path is None else configuration.identity_of(path)

    def names_like(self, keys: Collection[str]) -> Sequence[Sequence[str]]:
        """The models of the source files whose classes have every name in the keys of a checkpoint, file by file.

        The names that a file imports from other files of timm count as its own, but a file that has more of them itself
        comes earlier. It is none where the names say too little: few keys, few names, or names that most files have.
        """
        words = _words_in("\n".join(keys)) - _TENSOR_WORDS
        if len(keys) < _FEWEST_KEYS or len(words) < _FEWEST_WORDS:
            return []
        layers = set().union(*(_Source.of(path.read_text(encoding="utf-8")).words for path in _paths("layers")))
        likely, files = [], {module: source for module, source in _sources().items() if source.models}
        for module, source in files.items():
            if words <= _words_with_imports(module) | layers:
                likely.append((len(words - source.words), len(source.words - words), sorted(source.models)))
        return [names for *_, names in sorted(likely)] if 2 * len(likely) < len(files) else []


PROVIDER = Timm()


def is_model_name(name: str) -> bool:
    """Whether timm registers a model of this name, which may have a tag. Only the file that defines it is searched."""
    if re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) is None:
        return False
    architecture = name.partition(".")[0]
    defined = f"\ndef {architecture}(".encode()
    for path in _paths():
        data = path.read_bytes()
        if defined in data and architecture in _REGISTERED.findall(data.decode()):
            return True
    return False


_REGISTERED = re.compile(r"^@register_model[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)
#: A line of the configurations of weights: `'resnet50.a1_in1k': _cfg(`. A star marks the default.
_TAGGED = re.compile(r"""^[ \t]+['"](\w+)\.(\w+)\*?['"]\s*:\s*(?:\w+\(|\{)""", re.MULTILINE)
_IMPORT = re.compile(r"^from (?:\.|timm\.models\.)([a-z]\w+|_efficientnet_\w+) import", re.MULTILINE)
#: What gives a module or tensor its name: an attribute that is set, and text that begins so, `f'layer{stage}'`.
_NAME = re.compile(r"""self\.(\w+)\s*(?::[^=\n]*)?=|['"]([A-Za-z_][\w.]*)""")
#: The names that PyTorch's own modules give their tensors and children.
_TENSOR_WORDS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "in_proj_weight"})


@dataclass(frozen=True)
class _Source:
    """The names in a source file of timm.

    Attributes:
        models: the names of the models that it registers.
        tagged: the names of models with the tags of their weights.
        imports: the other files of models that it takes classes and functions from.
        words: the words in the names that it gives to modules and tensors, among others.
    """

    models: tuple[str, ...]
    tagged: tuple[tuple[str, str], ...]
    imports: tuple[str, ...]
    words: frozenset[str]

    @classmethod
    def of(cls, text: str) -> _Source:
        """Find the names in the text of a file."""
        named = " ".join(first or second for first, second in _NAME.findall(text))
        return cls(
            tuple(_REGISTERED.findall(text)),
            tuple(_TAGGED.findall(text)),
            tuple(_IMPORT.findall(text)),
            _words_in(named),
        )


def _paths(folder_name: str = "models") -> list[Path]:
    folder = installed.folder("timm")
    return [] if folder is None else sorted((folder / folder_name).glob("*.py"))


@functools.cache
def _sources() -> Mapping[str, _Source]:
    """Return every file of models, by the name of its module."""
    return {path.stem: _Source.of(path.read_text(encoding="utf-8")) for path in _paths()}


def _words_in(text: str) -> frozenset[str]:
    """Return the words in a text, without numbers: `layer` in `layer1.0` and in `layer{stage}`."""
    return frozenset(word.strip("_") for word in re.findall(r"[A-Za-z_]+", text)) - {""}


def _words_with_imports(module: str) -> set[str]:
    """Return the words of a file of models, and of the files that it imports, directly or indirectly."""
    known, found, waiting = _sources(), {module}, [module]
    while waiting:
        for name in known[waiting.pop()].imports:
            if name in known and name not in found:
                found.add(name)
                waiting.append(name)
    return set().union(*(known[name].words for name in found))

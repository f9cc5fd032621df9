"""From a `config.json` to a configuration and a model class of transformers; code that it names is never run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcli.errors import FileFormatError, ModelcliError, RequestError, UnsafeError, did_you_mean
from modelcli.language.expressions import Call
from modelcli.live import bounds, downloads
from modelcli.live.providers.huggingface import remote_code, vetting
from modelcli.wording import counted, listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: How many of transformers' warnings become notes.
_MOST_WARNINGS = 3
#: The entry of a configuration that names Python files, of the same folder or of another repository.
REMOTE_CODE = "auto_map"


@dataclass(frozen=True)
class Described:
    """What a configuration describes.

    Attributes:
        document: the configuration as JSON values.
        vetted: it without what is not read of it: see `vetting`.
        model_class: the class of transformers that is built.
        overrides: the keyword arguments of the reference, which replace values of the configuration.
        notes: what the user should know.
    """

    document: Mapping[str, Any]
    vetted: Mapping[str, Any]
    model_class: type[PreTrainedModel]
    overrides: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def is_of_transformers(self) -> bool:
        """Whether its class is transformers' own, so that its name is enough to build it anywhere."""
        return find_class(self.model_class.__name__) is self.model_class

    def configuration(self) -> PreTrainedConfig:
        """A configuration of its own for each model: a model changes the one that it is built from."""
        return configuration_of(self.document, self.model_class.config_class, self.overrides)

    def build(self) -> PreTrainedModel:
        """The model on the current device, its values drawn as transformers draws them."""
        with vetting.contained():
            config = configuration_of(self.vetted, self.model_class.config_class, self.overrides)
            model: PreTrainedModel = self.model_class._from_config(config)
        return model.eval()

    def by_class(self) -> Call:
        """The model as a call of its class with the values of its configuration, from which it can be built again."""
        document = self.configuration().to_diff_dict()
        values = {key: value for key, value in document.items() if key not in _NOT_ARGUMENTS}
        plain: dict[str, Any] = self.model_class.config_class._encode_special_floats(values)
        return Call(self.model_class.__name__, (), plain)


#: Entries of a configuration that say what it is, and not what is in it.
_NOT_ARGUMENTS = frozenset({"architectures", "model_type", "transformers_version", "auto_map", "_name_or_path"})


def describe(
    document: Mapping[str, Any],
    overrides: Mapping[str, Any],
    what: str,
    *,
    trust: bool = False,
    folder: Path | None = None,
) -> Described:
    """Find the class that a configuration describes.

    Args:
        document: the `config.json`.
        overrides: values that replace those of the configuration; `auto_class` names an auto class of transformers
            that chooses the model class instead of the first of `architectures`.
        what: what the configuration is of, for messages.
        trust: whether code that comes with the model may run, and what it names may be loaded.
        folder: the folder of the model, in which such code lies.

    Raises:
        RequestError: an override that the configuration does not have, or an unknown class.
        UnsafeError: only code that comes with the model could build it, or it names something to load.
        FileFormatError: the configuration names no class.
    """
    given = dict(overrides)
    auto_class = given.pop("auto_class", None)
    clean = vetting.vetted({**document, **given}, what, trust=trust)
    if trust and folder is not None and document.get(REMOTE_CODE):
        return _described_by_code(document, clean, given, auto_class, folder)
    config_class = _config_class(document, what)
    if (part := _part_with_code(document)) is not None:
        raise _needs_its_code(what, part)
    with vetting.contained(bounds.of_configuration(f"the configuration of {what}")), vetting.heard() as warned:
        # Refuses wrong values, and names that only the reference has, before anything is built.
        _read(_without(clean, given.keys() - document.keys()), config_class, given, what)
    model_class = _named_class(document, what) if auto_class is None else _class_of(auto_class, config_class, what)
    notes = [_warning(line, given, document, what) for line in warned[:_MOST_WARNINGS]]
    if any(document.get(name) for name in vetting.REMOTE_CODE):
        notes.append(
            f"the configuration of {what} also names code that comes with the model: it is not run, "
            f"transformers' own {model_class.__name__} is built"
        )
    quantized = document.get("quantization_config")
    if isinstance(quantized, Mapping) and quantized.get("quant_method") is not None:
        notes.append(
            f"the weights of {what} are quantized ({quantized['quant_method']!s:.40}): "
            "the layers are shown as they are without that"
        )
    return Described(document, clean, model_class, given, tuple(notes))


def of_class(model_class: type[PreTrainedModel], values: Mapping[str, Any]) -> Described:
    """What a class with the values of its configuration describes, as a record names it or somebody types it.

    Any value may stand there, because any may stand in a `config.json`. A name that the class does not know and that
    is nearly one that it knows is told. Raises RequestError for values that it does not take, and UnsafeError.
    """
    name, config_class = model_class.__name__, model_class.config_class
    document = {"model_type": config_class.model_type, "architectures": [name], **values}
    auto_class = {"auto_class": document.pop("auto_class")} if "auto_class" in values else {}
    try:
        found = describe(document, auto_class, name)
    except FileFormatError as error:
        raise RequestError(error.message) from error
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map, *_SET_BY_NAME}
    notes = [
        f"the configuration of {name} has no {given!r}: {hint}"
        for given in values
        if given not in known and (hint := did_you_mean(given, sorted(known))) is not None
    ]
    return replace(found, notes=(*found.notes, *notes))


def _without(values: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


#: Arguments of every configuration that are no fields of its class.
_SET_BY_NAME = ("auto_class", "num_labels", "attn_implementation", "num_classes", "label_names")


def _described_by_code(
    document: Mapping[str, Any], clean: Mapping[str, Any], given: Mapping[str, Any], auto_class: object, folder: Path
) -> Described:
    """What a configuration describes with the classes that come with it, which are imported: the user trusts them."""
    config_class, model_class = remote_code.classes_of(document, folder, auto_class)
    model_class.config_class = config_class
    note = f"the code that comes with {folder} was imported: it builds the model"
    return Described(document, clean, model_class, given, (note,))


def _config_class(document: Mapping[str, Any], what: str) -> type[PreTrainedConfig]:
    """The class of a configuration.

    Raises UnsafeError where only code that comes with the model has it, RequestError where nothing has.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = document.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
        return config_class
    if document.get(REMOTE_CODE):
        raise _needs_its_code(what, f"transformers does not know its model type {model_type!r}")
    hint = did_you_mean(str(model_type), list(CONFIG_MAPPING)) or "pip install --upgrade transformers may know it"
    raise RequestError(
        f"the model type of {what} is {model_type!r}, which transformers {transformers.__version__} does not know",
        hint,
    )


def _needs_its_code(what: str, why: str) -> UnsafeError:
    return UnsafeError(
        f"only code that comes with {what} can build it: {why}",
        "pass --trust to run that code, or --bare-keys to work on the tensors alone",
    )


def _warning(line: str, given: Mapping[str, Any], document: Mapping[str, Any], what: str) -> str:
    """A note on what transformers warns of when it reads a configuration."""
    labels = document.get("id2label")
    if "num_labels" in given and "`id2label`" in line and isinstance(labels, Mapping):
        names = counted(len(labels), "class", "classes")
        return f"num_labels={given['num_labels']} leaves out the names of the {names} that {what} tells apart"
    return f"transformers says of the configuration of {what}: {line if len(line) <= 300 else line[:300] + '...'}"


def _named_class(document: Mapping[str, Any], what: str) -> type[PreTrainedModel]:
    """The first of the classes that a configuration names.

    Raises FileFormatError where it names none, UnsafeError where only code that comes with it has the class,
    RequestError for one that is no model class of transformers.
    """
    architectures = document.get("architectures")
    if not isinstance(architectures, Sequence) or isinstance(architectures, str) or not architectures:
        raise FileFormatError(
            f"the configuration of {what} names no architectures",
            "name a class: hf:...(auto_class=AutoModel)",
        )
    name = architectures[0]
    found = find_class(name)
    if found is None and document.get(REMOTE_CODE):
        raise _needs_its_code(what, f"transformers does not have its class {name!r}")
    if found is None:
        raise RequestError(
            f"the configuration of {what} names {name!r}, which is no model class of transformers",
            "name one: hf:...(auto_class=AutoModel)",
        )
    return found


def find_class(name: object) -> type[PreTrainedModel] | None:
    """The model class of transformers with this name, or None."""
    import transformers

    if not isinstance(name, str) or not name.isidentifier():
        return None
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    model_class: type[PreTrainedModel] = found
    return model_class if model_class.config_class is not None else None


def _class_of(auto_class: object, config_class: type[PreTrainedConfig], what: str) -> type[PreTrainedModel]:
    """The model class that an auto class of transformers chooses for a configuration."""
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class

    name = str(getattr(auto_class, "__name__", auto_class))
    found: Any = getattr(transformers, name, None) if name.isidentifier() else None
    is_auto_class = isinstance(found, type) and issubclass(found, _BaseAutoModelClass)
    if not is_auto_class:
        names = [known for known in dir(transformers) if known.startswith("AutoModel")]
        raise RequestError(f"transformers has no auto class {name!r}", did_you_mean(name, names) or listed(names, 5))
    if config_class not in found._model_mapping:
        raise RequestError(f"{name} has no model of the type {config_class.model_type!r}, which {what} has")
    model_class: type[PreTrainedModel] = _get_model_class(config_class(), found._model_mapping)
    return model_class


def pattern_of(model: object, attribute: str) -> Callable[[str], bool]:
    """Whether a key matches one of the patterns that a model class lists, such as of keys that files leave out."""
    patterns = [re.compile(pattern) for pattern in getattr(model, attribute, None) or ()]
    return lambda key: any(pattern.search(key) for pattern in patterns)


def configuration_of(
    document: Mapping[str, Any], config_class: type[PreTrainedConfig], overrides: Mapping[str, Any], what: str = ""
) -> PreTrainedConfig:
    """The configuration as transformers reads it, without a word: `describe` has told what transformers warns of.

    Raises RequestError for values that it does not take.
    """
    with vetting.quiet():
        return _read(document, config_class, overrides, what)


def _read(
    document: Mapping[str, Any], config_class: type[PreTrainedConfig], overrides: Mapping[str, Any], what: str
) -> PreTrainedConfig:
    """The same, with what transformers logs."""
    refused: ModelcliError | None = None
    try:
        values = config_class._decode_special_floats(dict(document))
        made, unused = config_class.from_dict(values, return_unused_kwargs=True, **overrides)
    except ModelcliError:
        raise
    except Exception as error:
        refused = _refusal(error, document, what)
    if refused is not None:  # outside of the block, so that it is not taken for the error of a download
        raise refused
    if unused:
        name = next(iter(unused))
        hint = did_you_mean(name, [*made.to_dict(), "num_labels"]) or "the values of its config.json can be overridden"
        raise RequestError(f"the configuration of {what} has no {name!r}", hint)
    configuration: PreTrainedConfig = made
    return configuration


def _refusal(error: Exception, document: Mapping[str, Any], what: str) -> ModelcliError:
    """What is told of a configuration that transformers cannot read."""
    if downloads.is_not_cached(error):
        asked = downloads.asked_for(error)
        return UnsafeError(
            f"the configuration of {what} names something to load that is not in its folder"
            + (f": {asked}" if asked is not None else ""),
            "write the configuration of that part into its config.json",
        )
    return FileFormatError(
        f"transformers cannot read the configuration of {what}: {_unknown_part(document) or _first_line(error)}",
        "mend its config.json, or pass --bare-keys to work on the tensors alone",
    )


def _part_with_code(document: Mapping[str, Any]) -> str | None:
    """Which part of a configuration only code that comes with it can build, as a sentence; or None."""
    with_code = {name: part for name, part in document.items() if isinstance(part, Mapping) and part.get(REMOTE_CODE)}
    return _unknown_part(with_code)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _unknown_part(document: Mapping[str, Any]) -> str | None:
    """Which part of a configuration has a model type that transformers does not know, as a sentence; or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name, part in document.items():
        model_type = part.get("model_type") if isinstance(part, Mapping) else None
        if model_type is not None and (not isinstance(model_type, str) or model_type not in CONFIG_MAPPING):
            return f"the model type of its {name} is {model_type!r}, which transformers does not know"
    return None


def parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A configuration and those of its parts, such as the text and the image model of a pair."""
    return [part for _, part in named_parts(config)]


def named_parts(config: PreTrainedConfig, prefix: str = "") -> list[tuple[str, PreTrainedConfig]]:
    """The same with what stands before the names of their values: nothing, then `text_config.`."""
    found = [(prefix, config)]
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            found += named_parts(part, f"{prefix}{name}.")
    return found

"""From a `config.json` to a configuration and a model class of transformers; code that it names is never run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelcli.errors import FileFormatError, RequestError, UnsafeError, did_you_mean
from modelcli.language.expressions import Call
from modelcli.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: The entry of a configuration that names Python files, of the same folder or of another repository.
REMOTE_CODE = "auto_map"


@dataclass(frozen=True)
class Described:
    """What a configuration describes.

    Attributes:
        document: the configuration as JSON values.
        model_class: the class of transformers that is built.
        overrides: the keyword arguments of the reference, which replace values of the configuration.
        notes: what the user should know.
    """

    document: Mapping[str, Any]
    model_class: type[PreTrainedModel]
    overrides: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def configuration(self) -> PreTrainedConfig:
        """A configuration of its own for each model: a model changes the one that it is built from."""
        return configuration_of(self.document, self.model_class.config_class, self.overrides)

    def build(self) -> PreTrainedModel:
        """The model on the current device, its values drawn as transformers draws them."""
        model: PreTrainedModel = self.model_class(self.configuration())
        return model.eval()

    def by_class(self) -> Call:
        """The model as a call of its class with the values of its configuration, from which it can be built again."""
        document = self.configuration().to_diff_dict()
        values = {key: value for key, value in document.items() if key not in _NOT_ARGUMENTS}
        return Call(self.model_class.__name__, (), values)


#: Entries of a configuration that say what it is, and not what is in it.
_NOT_ARGUMENTS = frozenset(
    {"architectures", "model_type", "transformers_version", "auto_map", "_name_or_path", "dtype"}
)


def describe(document: Mapping[str, Any], overrides: Mapping[str, Any], what: str, *, trust: bool) -> Described:
    """Find the class that a configuration describes.

    Args:
        document: the `config.json`.
        overrides: values that replace those of the configuration; `auto_class` names an auto class of transformers
            that chooses the model class instead of the first of `architectures`.
        what: what the configuration is of, for messages.
        trust: whether code that comes with the model may run.

    Raises:
        RequestError: an override that the configuration does not have, or an unknown class.
        UnsafeError: only code that comes with the model could build it.
        FileFormatError: the configuration names no class.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = document.get("model_type")
    if model_type not in CONFIG_MAPPING:
        if document.get(REMOTE_CODE):
            raise UnsafeError(
                f"the model type of {what} is {model_type!r}, which only code that comes with the model can build",
                "modelcli does not run it; --bare-keys works on the tensors alone",
            )
        hint = did_you_mean(str(model_type), list(CONFIG_MAPPING)) or "pip install --upgrade transformers may know it"
        raise RequestError(
            f"the model type of {what} is {model_type!r}, which transformers {transformers.__version__} does not know",
            hint,
        )
    given = dict(overrides)
    auto_class = given.pop("auto_class", None)
    config_class = CONFIG_MAPPING[model_type]
    configuration_of(document, config_class, given, what)  # refuses wrong values before anything is built
    if auto_class is None:
        model_class = _named_class(document.get("architectures"), what)
    else:
        model_class = _class_of(auto_class, config_class, what)
    notes = []
    if document.get(REMOTE_CODE):
        notes.append(
            f"the configuration of {what} also names code that comes with the model: it is not run, "
            f"transformers' own {model_class.__name__} is built"
        )
    return Described(document, model_class, given, tuple(notes))


def _named_class(architectures: object, what: str) -> type[PreTrainedModel]:
    """The first of the classes that a configuration names. Raises FileFormatError where transformers has none of it."""
    if not isinstance(architectures, Sequence) or isinstance(architectures, str) or not architectures:
        raise FileFormatError(
            f"the configuration of {what} names no architectures",
            "name a class: hf:...(auto_class=AutoModel)",
        )
    name = architectures[0]
    found = find_class(name)
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
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


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
    """The configuration as transformers reads it. Raises RequestError for values that it does not take."""
    try:
        values = config_class._decode_special_floats(dict(document))
        made, unused = config_class.from_dict(values, return_unused_kwargs=True, **overrides)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(f"transformers cannot read the configuration of {what}: {first}") from error
    if unused:
        name = next(iter(unused))
        hint = did_you_mean(name, [*made.to_dict(), "num_labels"]) or "the values of its config.json can be overridden"
        raise RequestError(f"the configuration of {what} has no {name!r}", hint)
    configuration: PreTrainedConfig = made
    return configuration

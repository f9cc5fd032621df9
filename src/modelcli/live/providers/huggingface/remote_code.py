"""Classes that come with a model as Python files. They are imported for `--trust` alone, from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcli.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def classes_of(
    document: Mapping[str, Any], folder: Path, auto_class: object
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The classes of the configuration and of the model that a configuration names, as `trust_remote_code=True` does.

    Args:
        document: the `config.json`.
        folder: the folder of the model.
        auto_class: the auto class that chooses the model, such as `AutoModel`; None for the one whose class is the
            first of `architectures`.

    Raises RequestError where there is no such class, or where importing it fails.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = {key: value for key, value in document.get("auto_map", {}).items() if isinstance(value, str)}
    first = next(iter(document.get("architectures") or ()), None)
    if auto_class is not None:
        model = named.get(str(getattr(auto_class, "__name__", auto_class)))
    else:
        models = [value for key, value in named.items() if key.startswith("AutoModel")]
        model = next((value for value in models if value.rpartition(".")[2] == first), next(iter(models), None))
    configuration = named.get("AutoConfig")
    if model is None or configuration is None:
        raise RequestError(f"the configuration in {folder} names no code of a model", "auto_map names its classes")
    for reference in (configuration, model):
        if "--" in reference:
            raise RequestError(
                f"the configuration in {folder} names code of another repository: {reference}",
                "download the Python files into the folder",
            )
    try:
        return (
            get_class_from_dynamic_module(configuration, folder, local_files_only=True),
            get_class_from_dynamic_module(model, folder, local_files_only=True),
        )
    except Exception as error:
        raise RequestError(f"the code that comes with {folder} cannot be imported: {error}") from error

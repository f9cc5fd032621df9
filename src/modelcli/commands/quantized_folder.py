"""The files beside the keys of a library's model whose weights are, or were, quantized. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelcli.checkpoints.layout import Bytes
from modelcli.live.providers import companions
from modelcli.live.providers.companions import Companions
from modelcli.model.dequantized import Dequantized
from modelcli.model.dtypes import FLOATING
from modelcli.model.paths import parent_of
from modelcli.model.scaled_weights import activation_scales, is_packed
from modelcli.model.state_dict import StateDictModel
from modelcli.providers import configuration, quantization
from modelcli.wording import counted, is_or_are, listed

#: The entries of a configuration that state the dtype of the weights: of transformers 5, and of earlier versions.
_DTYPES = ("dtype", "torch_dtype")
#: The entries of a quantization that list modules without one, by its method; another method has none that is known.
_SKIPPED = {"fp8": "modules_to_not_convert", "compressed-tensors": "ignore"}
#: Files that only describe a quantization, such as those of ModelOpt and AutoGPTQ.
_DESCRIPTIONS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def beside(folder: Path, model: StateDictModel, opened: StateDictModel) -> Companions:
    """Return the files of a folder with the configuration of the edited model.

    The configuration says nothing of a quantization if no weight has one any more, lists the modules that have none if
    some have, and states the dtype of most elements. Other edits leave it as it is, which a note says.

    Args:
        folder: the folder of the model.
        model: the edited model.
        opened: the model as it is in the folder.
    """
    found = companions.of(folder)
    document = configuration.configuration_in(folder) or {}
    left = [name for name, tensor in model.tensors.items() if is_packed(tensor.dtype, len(tensor.shape or ()))]
    made = [name for name, tensor in model.tensors.items() if isinstance(tensor.source, Dequantized)]
    edited, notes = dict(document), list[str]()
    files = dict(found.files)
    if not left:
        edited = quantization.without(document)
        notes.append(f"{configuration.NAME}: {listed(_removed(document), 2)} removed")
        if gone := [name for name in _DESCRIPTIONS if files.pop(name, None) is not None]:
            notes.append(f"{listed(gone, 3)} {is_or_are(len(gone))} left out: no weight is quantized any more")
    elif made:
        edited, told = _with_skipped(document, sorted({parent_of(name) for name in made}))
        notes.append(told)
    dtype = _most_usual_dtype(model)
    if dtype is not None and (not left or made):
        edited, of_dtype = _with_dtype(edited, dtype)
        notes += of_dtype
    if others := _other_keys(model, opened):
        notes.append(
            f"{configuration.NAME} is not changed for edits of keys, and {listed(others, 3)} {is_or_are(len(others))} "
            "new or gone: change it if the model has other layers now"
        )
    if edited != document:
        text = json.dumps(edited, indent=2, ensure_ascii=False) + "\n"
        files[configuration.NAME] = Bytes(text.encode("utf-8", "surrogatepass"))
    return replace(found, files=files, notes=(*notes, *found.notes))


def _removed(document: Mapping[str, Any]) -> list[str]:
    """Return the entries that describe a quantization, in a configuration and in its parts."""
    parts = {"": document, **{f"{name}.": part for name, part in document.items() if isinstance(part, dict)}}
    return [f"{prefix}{name}" for prefix, part in parts.items() for name in quantization.ENTRIES if name in part]


def _with_skipped(document: Mapping[str, Any], modules: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return a configuration that lists modules as not quantized, and a note."""
    for entry in quantization.ENTRIES:
        described = document.get(entry)
        if not isinstance(described, dict) or (key := _SKIPPED.get(str(described.get("quant_method")))) is None:
            continue
        listed_before = described.get(key)
        names = [*listed_before] if isinstance(listed_before, list) else []
        names += [name for name in modules if name not in names]
        count = counted(len(modules), "module")
        return (
            {**document, entry: {**described, key: names}},
            f"{configuration.NAME}: {key} lists {count} more, which {is_or_are(len(modules))} not quantized any more",
        )
    return dict(document), (
        f"{configuration.NAME} still says that all weights are quantized, and {counted(len(modules), 'module')} "
        f"{is_or_are(len(modules))} not: say so in its quantization_config"
    )


def _most_usual_dtype(model: StateDictModel) -> str | None:
    """Return the dtype of most floating-point elements that are not narrow."""
    elements: dict[str, int] = {}
    for tensor in model.by_identity(model.tensors).values():
        if tensor.dtype in FLOATING and not is_packed(tensor.dtype, 2):
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
    return max(elements, key=elements.__getitem__) if elements else None


def _with_dtype(document: Mapping[str, Any], dtype: str) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration that states a dtype wherever it states one, and notes.

    A part that states another dtype than the whole keeps it.
    """
    named = [name for name in _DTYPES if name in document]
    before = next((_dtype_of(document[name]) for name in named), None)
    if before == dtype:
        return dict(document), []
    edited = {**document, **dict.fromkeys(named or _DTYPES[:1], dtype)}
    for name, part in document.items():
        if name.endswith("_config") and isinstance(part, dict):
            own = {key: dtype for key in _DTYPES if key in part and _dtype_of(part[key]) == before}
            edited[name] = {**part, **own}
    return edited, [
        f"{configuration.NAME}: dtype: {before} -> {dtype}" if before else f"{configuration.NAME}: dtype: {dtype}"
    ]


def _dtype_of(stated: Any) -> str | None:
    return stated.removeprefix("torch.") if isinstance(stated, str) else None


def _other_keys(model: StateDictModel, opened: StateDictModel) -> list[str]:
    """Return the keys that edits other than a dequantization have made or removed."""
    known = {name for name, tensor in model.tensors.items() if isinstance(tensor.source, Dequantized)}
    known = {scale for name in known for scale in activation_scales(name, opened.tensors)}
    scales = {
        tensor.source.scale.identity for tensor in model.tensors.values() if isinstance(tensor.source, Dequantized)
    }
    new = [name for name in model.entries if name not in opened.entries]
    gone = [name for name in opened.entries if name not in model.entries and name not in known]
    return new + [name for name in gone if name not in opened.tensors or opened.tensors[name].identity not in scales]

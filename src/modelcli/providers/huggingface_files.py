"""Check that the files in a folder of a Hugging Face model agree, without transformers.

This compares only names and shapes. Whether the configuration builds exactly the keys of the files can only be checked
by building the model, which `check --arch-check` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelcli.files.open_folder import read_regular
from modelcli.model.dtypes import FLOATING
from modelcli.providers import configuration

#: The shape and the dtype of each tensor, by its key.
Tensors = Mapping[str, tuple[Sequence[int] | None, str]]

#: The endings of the keys of input embeddings, the most usual first.
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
    "token_embedding.weight",
)
#: The endings of the keys of output embeddings.
_OUTPUTS = ("lm_head.weight", "embed_out.weight", "output_projection.weight")
#: The names of the number of layers in configurations.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: The names of the number of multi-token-prediction layers, which follow the others and are not counted among them.
_FURTHER_LAYERS = "num_nextn_predict_layers"
#: The largest size of a tokenizer file in bytes. A tokenizer of a million entries has 60 MB.
_MAX_TOKENIZER_BYTES = 200_000_000


def compare(folder: Path, tensors: Tensors) -> tuple[list[str], list[str]]:
    """Compare the configuration and the tokenizer of a folder with its tensors.

    Args:
        folder: a folder with a `config.json`.
        tensors: the shape and the dtype of each tensor, by its key.

    Returns:
        The names of the files that were compared, and a sentence for each fault.

    Raises:
        FileFormatError: the configuration cannot be read.
    """
    document = configuration.configuration_in(folder) or {}
    text = _of_text_model(document)
    rows = _rows_of_embedding(tensors)
    faults = [
        *_vocabulary_faults(text, rows),
        *_tie_faults(document, text, tensors, rows),
        *_layer_faults(text, tensors),
        *_dtype_faults(document, tensors),
    ]
    compared = [configuration.NAME]
    for name, entries in _tokenizers(folder, faults):
        compared.append(name)
        if rows is not None and entries > rows[1]:
            faults.append(f"{name} has entries up to number {entries - 1:,}, and {rows[0]} has {rows[1]:,} rows")
    return compared, faults


def _of_text_model(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the text model."""
    part = document.get("text_config")
    return part if isinstance(part, dict) else document


def _rows_of_embedding(tensors: Tensors) -> tuple[str, int] | None:
    """Return the key of the input embedding, and its number of rows; None if no key is a known one."""
    for ending in _EMBEDDINGS:
        for key, (shape, _) in tensors.items():
            if _ends_in(key, ending) and shape is not None and len(shape) == 2:
                return key, shape[0]
    return None


def _ends_in(key: str, ending: str) -> bool:
    """Whether a key ends in these components."""
    return key == ending or key.endswith(f".{ending}")


def _vocabulary_faults(text: Mapping[str, Any], rows: tuple[str, int] | None) -> Iterator[str]:
    size = text.get("vocab_size")
    if rows is not None and isinstance(size, int) and size != rows[1]:
        yield f"{configuration.NAME} says vocab_size {size:,}, and {rows[0]} has {rows[1]:,} rows"


def _tie_faults(
    document: Mapping[str, Any], text: Mapping[str, Any], tensors: Tensors, rows: tuple[str, int] | None
) -> Iterator[str]:
    """Yield a fault if the tensors are not tied as the configuration says; if it says nothing, the class decides."""
    tied = document.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    output = next((key for key in tensors for ending in _OUTPUTS if _ends_in(key, ending)), None)
    if not isinstance(tied, bool) or rows is None or not _is_language_model(document):
        return
    if tied and output is not None:
        yield (
            f"{configuration.NAME} says tie_word_embeddings true, and the files have both {rows[0]} and {output}: "
            "one of the two is not used"
        )
    if not tied and output is None:
        yield f"{configuration.NAME} says tie_word_embeddings false, and the files have no {_OUTPUTS[0]}"


def _is_language_model(document: Mapping[str, Any]) -> bool:
    """Whether the class of the model has an output embedding."""
    names = document.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return False
    return names[0].endswith(("ForCausalLM", "LMHeadModel"))


def _layer_faults(text: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Yield a fault if the configuration has another number of layers. Compared only if one list has most keys."""
    wanted = next((text[name] for name in _LAYERS if isinstance(text.get(name), int)), None)
    name = next((name for name in _LAYERS if isinstance(text.get(name), int)), "")
    lists: dict[str, set[int]] = {}
    keys: dict[str, int] = {}
    for key in tensors:
        if match := re.match(r"((?:[^.]+\.)*?(?:layers?|h|blocks?))\.(\d{1,9})\.", key):
            lists.setdefault(match[1], set()).add(int(match[2]))
            keys[match[1]] = keys.get(match[1], 0) + 1
    if wanted is None or len(lists) != 1:
        return
    ((path, found),) = lists.items()
    further = text.get(_FURTHER_LAYERS)
    most = wanted + (further if isinstance(further, int) else 0)
    gaps = sorted(set(range(wanted)) - found)
    if gaps:
        yield f"{configuration.NAME} says {name} {wanted}, and the files have no {path}.{gaps[0]}"
    if beyond := sorted(number for number in found if number >= most):
        yield f"{configuration.NAME} says {name} {wanted}, and the files have {path}.{beyond[0]} as well"


def _dtype_faults(document: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Yield a fault if most elements do not have the dtype of the configuration. Not compared for quantized models."""
    stated = document.get("dtype", document.get("torch_dtype"))
    if not isinstance(stated, str) or document.get("quantization_config"):
        return
    stated = stated.removeprefix("torch.")
    elements: dict[str, int] = {}
    for shape, dtype in tensors.values():
        if dtype in FLOATING:
            count = 1
            for size in shape or ():
                count *= size
            elements[dtype] = elements.get(dtype, 0) + count
    if elements and (most := max(elements, key=elements.__getitem__)) != stated:
        yield f"{configuration.NAME} says dtype {stated}, and most elements are {most}"


def _tokenizers(folder: Path, faults: list[str]) -> Iterator[tuple[str, int]]:
    """Yield the files with a vocabulary, each with its number of tokens: one more than the largest token id."""
    for name, entries_in in (
        ("tokenizer.json", _of_tokenizer),
        ("vocab.json", _of_vocabulary),
        ("added_tokens.json", _of_vocabulary),
    ):
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > _MAX_TOKENIZER_BYTES:
                raise ValueError(f"it has {path.stat().st_size:,} bytes")
            yield name, max(entries_in(json.loads(read_regular(path))), default=-1) + 1
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            faults.append(f"{name} cannot be read: {error}")


def _of_tokenizer(document: Any) -> list[int]:
    """Return the token ids in a `tokenizer.json`: those of its model's vocabulary and of the added tokens."""
    vocabulary = document.get("model", {}).get("vocab", {})
    numbers = _of_vocabulary(vocabulary) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    return [*numbers, *(int(token["id"]) for token in document.get("added_tokens", ()))]


def _of_vocabulary(document: Any) -> list[int]:
    """Return the token ids in a vocabulary."""
    return [int(number) for number in document.values()]

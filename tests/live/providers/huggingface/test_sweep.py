"""Every edit on every model type that `tiny` lists: what is written is what plain transformers makes of the same edit.

Each model is saved by transformers, edited through the real `main()`, and loaded again by `from_pretrained`: no key may
be missing, unexpected or of another shape, and the tensors and the outputs are those of the plain model, edited in
plain Python. Where that cannot be, a table below names it with the reason.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

import modelcli
from modelcli.language.references import Source
from modelcli.live.opening import open_live
from tests.conftest import Cli
from tests.live.providers.huggingface.test_model_types import save
from tests.live.providers.huggingface.tiny import MODELS, MORE_MODELS, loaded, model

NAMES = [*MODELS, *MORE_MODELS]
FORMS = ("safetensors", "shards", "bin")
EDITS = ("looks", "save", "freeze", "cast", "head", "remove first", "remove last")

#: What each run of the tests has; `make test-long` has all.
QUICK = {
    ("BertForSequenceClassification", "looks"),
    ("BertForSequenceClassification", "save"),
    ("MixtralForCausalLM", "cast"),
    ("Wav2Vec2ForCTC", "freeze"),
    ("BartForConditionalGeneration", "head"),
    ("DeepseekV3ForCausalLM", "remove first"),
    ("DetrForObjectDetection", "head"),
    ("LlavaForConditionalGeneration", "remove first"),
    ("LlavaForConditionalGeneration", "remove last"),
    ("Dinov2ForImageClassification", "remove last"),
    ("Speech2TextForConditionalGeneration", "remove last"),
    ("ConvNextForImageClassification", "remove last"),
    ("Mamba2ForCausalLM", "remove last"),  # an infinite number is in its configuration
}

#: The lists of layers from which one is removed, where they are not the outermost: the stages of these models differ in
#: their widths, and each stage has layers that do not.
LAYERS = {
    "SwinForImageClassification": ("swin.encoder.layers.0.blocks",),
    "ConvNextForImageClassification": ("convnext.encoder.stages.0.layers",),
    "ResNetForImageClassification": ("resnet.encoder.stages.0.layers",),
    "SegformerForSemanticSegmentation": ("segformer.stages.0.blocks",),
    "DetrForObjectDetection": ("model.encoder.layers", "model.decoder.layers"),
    "MobileViTForImageClassification": ("mobilevit.encoder.layer.2.transformer.layer",),
}
#: Sizes that leave something where a layer is removed.
SIZES: dict[str, dict[str, Any]] = {
    "SwinForImageClassification": {"depths": [2, 1]},
    "ConvNextForImageClassification": {"depths": [2, 1, 1, 1]},
    "ResNetForImageClassification": {"depths": [2, 1]},
    "SegformerForSemanticSegmentation": {"depths": [2, 1, 1, 1]},
    "RwkvForCausalLM": {"num_hidden_layers": 3},  # transformers divides by the number of layers beyond the first
    "PatchTSTForPrediction": {"num_hidden_layers": 2},
}

NO_CLASS = "transformers has no class with a classifier of this type"
_NO_HEAD = "no library says which module of this model is the classifier (@head)"

#: Models without a list of layers from which one could be removed.
WITHOUT_LISTS = {
    "AlbertForMaskedLM": "it uses one layer again and again",
    "TimmWrapperForImageClassification": "its layers are timm's: stages of one block",
}

#: What modelcli refuses, with what it says.
REFUSED = {
    ("FNetForMaskedLM", "cast"): "does not fit: [1,128,32] float32 flows in",  # its transform gives float32
    ("WavLMForCTC", "remove first"): "'WavLMAttention' object has no attribute 'rel_attn_embed'",  # only its first has
}

#: How many outputs a classifier has beyond one for each label: what is no object.
BEYOND = {"DetrForObjectDetection": 1}

#: What a configuration cannot say, mostly since the first layer has what others use or lack: the folder is written with
#: this note, and `modelcli.load` gives the edited model.
UNSAID = {
    ("ModernBertForMaskedLM", "remove first"): "model.layers.0.attn_norm (LayerNorm in the place of Identity)",
    ("T5ForConditionalGeneration", "remove first"): "SelfAttention.relative_attention_bias (removed)",
    ("MT5ForConditionalGeneration", "remove first"): "SelfAttention.relative_attention_bias (removed)",
    ("RwkvForCausalLM", "remove first"): "rwkv.blocks.0.pre_ln (removed)",
    # the rates of stochastic depth grow from layer to layer, and a configuration has only the last
    ("BeitForImageClassification", "remove first"): "beit.layers.0.drop_path",
    ("SwinForImageClassification", "remove first"): "swin.encoder.layers.0.blocks.0.drop_path",
    ("SegformerForSemanticSegmentation", "remove first"): "segformer.stages.0.blocks.0.drop_path",
    ("SegformerForSemanticSegmentation", "remove last"): "segformer.stages.1.blocks.0.drop_path",
    ("MobileViTForImageClassification", "remove first"): "mobilevit.encoder.layer.2.transformer.layer.1 (removed)",
    ("MobileViTForImageClassification", "remove last"): "mobilevit.encoder.layer.2.transformer.layer.1 (removed)",
}

#: What no plain model runs either: the layers keep their numbers, and only the number 0 may have no norm before it.
WITHOUT_A_PASS = {("RwkvForCausalLM", "remove first")}

#: The classes with a classifier, in the order in which one is chosen for a type.
CLASSIFIERS = (
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)


def test_the_tables_are_short_and_enough_types_are_covered() -> None:
    types = {getattr(transformers, name).config_class.model_type for name in NAMES}
    assert len(types) >= 60
    assert {name for name, _ in {**REFUSED, **UNSAID}} <= set(NAMES)
    assert len({**REFUSED, **UNSAID}) <= 16


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        pytest.param(name, edit, marks=() if (name, edit) in QUICK else pytest.mark.sweep)
        for name in NAMES
        for edit in EDITS
        if not (name in WITHOUT_LISTS and edit.startswith("remove"))
    ],
)
def test_an_edit_gives_what_plain_transformers_gives(cli: Cli, folder: Path, name: str, edit: str) -> None:
    form = FORMS[(NAMES.index(name) + EDITS.index(edit)) % 3]
    if edit == "looks":
        looks(cli, folder, name)
    elif edit == "save":
        real = made(name, folder, form)
        cli("save", "out/", "-m", "./model")
        same(folder / "out", real)
        assert cli("diff", "./model", "./out", "--json").json["same"]
    elif edit == "freeze":
        real = made(name, folder, form)
        done = cli("freeze", ".", "-m", "./model", "-o", "out/")
        assert "cannot say" not in done.err
        same(folder / "out", real)
        assert cli("params", "./out", "--trainable", "--json").json["tensors"] == []
        assert {row["change"] for row in different(cli)} == {"trainable"}
    elif edit == "cast":
        cast(cli, folder, name, form)
    elif edit == "head":
        head(cli, folder, name, form)
    else:
        remove(cli, folder, name, form, edit)


def made(name: str, folder: Path, form: str, **changed: Any) -> Any:
    """A model as transformers makes it, saved in the folder `model`."""
    real = model(name, **changed)
    save(real, folder / "model", form)
    return real


def looks(cli: Cli, folder: Path, name: str) -> None:
    """The looks are the same in each form, and count what plain PyTorch counts."""
    shown = []
    for form in FORMS:
        real = made(name, folder, form)
        rows = [cli(look, "./model", "--json").json for look in ("summary", "modules", "params")]
        for document in rows:
            document.pop("notes", None)  # they tell of shards
            assert document["totals"]["params"] == sum(parameter.numel() for parameter in real.parameters())
        assert [row["path"] for row in rows[1]["modules"]][1:] == [path for path, _ in real.named_modules() if path]
        shown.append(rows)
        (folder / "model").rename(folder / form)
    assert shown[0] == shown[1] == shown[2]


def cast(cli: Cli, folder: Path, name: str, form: str) -> None:
    """The file has the values that PyTorch rounds to; from_pretrained reads both alike."""
    real = made(name, folder, form)
    if refused(cli, name, "cast", "cast", ".", "bfloat16"):
        with pytest.raises(RuntimeError, match=r"[Ff]loat"):  # so does the plain model
            outputs(real.to(torch.bfloat16), inputs_of("model"))
        return
    done = cli("cast", ".", "bfloat16", "-m", "./model", "-o", "out/")
    assert "cannot say" not in done.err
    kept = real.state_dict()
    for tensor in [*real.parameters(), *(buffer for key, buffer in real.named_buffers() if key in kept)]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)
    real.config.dtype = torch.bfloat16
    real.save_pretrained(folder / "theirs")
    same(folder / "out", loaded(folder / "theirs")[0].eval(), tolerance=0.05)
    assert {row["change"] for row in different(cli)} <= {"dtype", "values"}


def head(cli: Cli, folder: Path, name: str, form: str) -> None:
    """The model is the one that transformers builds with the new number of labels."""
    real = classifier(name)
    if real is None:
        made(name, folder, form)
        done = cli("replace", "@head", "Linear(_,7)", "-m", "./model", "-o", "out/", code=2)
        assert _NO_HEAD in done.err, NO_CLASS
        return
    save(real, folder / "model", form)
    rows = cli("modules", "./model", "-s", "@head", "--json").json["modules"]
    layers = [real.get_submodule(row["path"]) for row in rows]
    width = 7 + BEYOND.get(name, 0)
    arguments = {
        nn.Linear: f"Linear(_,{width},bias=_)",
        nn.Conv1d: f"Conv1d(_,{width},_,bias=_)",
        nn.Conv2d: f"Conv2d(_,{width},_,bias=_)",
    }
    cli("replace", "@head", arguments[type(layers[0])], "-m", "./model", "-o", "out/")
    config = copy.deepcopy(real.config)
    config.num_labels = 7
    plain = type(real)(config).eval()
    found, report = loaded(folder / "out")
    own, old = found.state_dict(), real.state_dict()
    new = {key for key, tensor in plain.state_dict().items() if old[key].shape != tensor.shape}
    assert new
    assert {key.rpartition(".")[0] for key in new} == {row["path"] for row in rows}
    plain.load_state_dict({**old, **{key: own[key] for key in new}})
    assert not any(report.values())
    same(folder / "out", plain)
    assert new <= {row["name"] for row in different(cli)}


def classifier(name: str) -> Any:
    """A model of this type with a classifier: its own class, else the one that transformers has for the type."""
    real = model(name)
    if "num_labels" in vars(real):
        return real
    for mapping in CLASSIFIERS:
        if type(real.config) in mapping:
            found = mapping[type(real.config)]
            kind = found[0] if isinstance(found, (tuple, list)) else found
            torch.manual_seed(0)
            return kind(copy.deepcopy(real.config)).eval()
    return real if name == "DetrForObjectDetection" else None


def remove(cli: Cli, folder: Path, name: str, form: str, edit: str) -> None:
    """A layer of each list of layers is gone, and the others have moved."""
    changed = SIZES.get(name, {})
    real = made(name, folder, form, **changed)
    paths = list(lists_of_layers(name, real))
    assert paths, f"{name} has no list of layers"
    at = {path: 0 if edit == "remove first" else len(real.get_submodule(path)) - 1 for path in paths}
    targets = [f"{path}.{number}" for path, number in at.items()]
    if refused(cli, name, edit, "remove", *targets):
        return
    done = cli("remove", *targets, "-m", "./model", "-o", "out/")
    plain = model(name, **changed)
    for path, number in at.items():
        layers: Any = plain.get_submodule(path)
        del layers[number]
        for position, layer in enumerate(layers):
            for child in layer.modules():
                if hasattr(child, "layer_idx"):
                    child.layer_idx = position
    if (name, edit) in UNSAID:
        assert "config.json cannot say what" in done.err
        assert UNSAID[name, edit] in done.err
        edited: nn.Module = modelcli.load("./out").eval()
        same_tensors(edited, plain)
        if (name, edit) not in WITHOUT_A_PASS:
            same_outputs(edited, plain)
        return
    assert "cannot say" not in done.err
    found, _ = loaded(folder / "out")
    for own, theirs in zip(plain.modules(), found.modules(), strict=True):
        if isinstance(getattr(own, "config", None), transformers.PreTrainedConfig):
            own.config = theirs.config  # the number of layers and what belongs to each
    same(folder / "out", plain)
    gone = real.state_dict().keys() - plain.state_dict().keys()
    assert gone <= {row["name"] for row in different(cli) if row["change"] == "removed"}


def lists_of_layers(name: str, real: nn.Module) -> Iterator[str]:
    """The outermost lists of layers of one class."""
    if name in LAYERS:
        yield from LAYERS[name]
        return
    found: list[str] = []
    for path, child in real.named_modules():
        if not isinstance(child, nn.ModuleList) or any(path.startswith(f"{above}.") for above in found):
            continue
        kinds = {type(layer) for layer in child}
        if len(child) > 1 and len(kinds) == 1 and next(iter(kinds)).__name__.endswith(("Layer", "Block")):
            found.append(path)
    yield from found


def refused(cli: Cli, name: str, edit: str, *words: str) -> bool:
    """Whether the table has this edit; then it is refused with that message, and nothing is written."""
    if (name, edit) not in REFUSED:
        return False
    assert REFUSED[name, edit] in cli(*words, "-m", "./model", "-o", "out/", code=2).err
    assert not Path("out").exists()
    return True


def different(cli: Cli) -> list[dict[str, Any]]:
    """The tensors in which the written folder differs from the model."""
    document = json.loads(cli("diff", "./model", "./out", "--json", code=1).out)
    rows: list[dict[str, Any]] = document["tensors"]
    assert rows
    return rows


def same(out: Path, plain: Any, tolerance: float = 1e-4) -> None:
    """`from_pretrained` loads the folder completely, as a model with these tensors and these outputs."""
    found, report = loaded(out)
    assert not any(report.values()), report
    same_tensors(found, plain)
    same_outputs(found.eval(), plain, tolerance)


def same_tensors(found: nn.Module, plain: nn.Module) -> None:
    own, expected = found.state_dict(), plain.state_dict()
    assert own.keys() == expected.keys()
    for key, tensor in expected.items():
        assert own[key].dtype == tensor.dtype, key
        assert torch.equal(own[key], tensor), key


def same_outputs(found: Any, plain: Any, tolerance: float = 1e-4) -> None:
    inputs = inputs_of("out")
    own, expected = outputs(found, inputs), outputs(plain, inputs)
    assert expected
    assert len(own) == len(expected)
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def inputs_of(folder: str) -> dict[str, torch.Tensor]:
    """The inputs that modelcli knows, each text with its end, which a classifier looks for."""
    live = open_live(Source(f"./{folder}"))
    assert live.inputs is not None
    inputs = dict(live.inputs.tensors("cpu").kwargs)
    config: Any = live.module.config
    end = getattr(config.get_text_config(), "eos_token_id", None)
    if "Classification" in type(live.module).__name__ and isinstance(end, int) and "input_ids" in inputs:
        if end < config.get_text_config().vocab_size:
            inputs["input_ids"][:, -1] = end
        if "pixel_values" in inputs and "input_ids" in inputs:  # Gemma3: no place of the text is for the image
            del inputs["pixel_values"]
    return inputs


def outputs(real: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of floating-point numbers that a pass gives."""
    torch.manual_seed(0)
    given = {key: value.to(real.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        return list(flat(real(**given)))


def flat(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from flat(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from flat(value)

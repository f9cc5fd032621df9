"""`adapt` on folders of transformers: values are the library's, the configuration is updated, the result loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelcli
from modelcli.live import landmarks
from modelcli.live.surgery import seed_of
from modelcli.live.surgery.input_channels import adapted
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import model as tiny_model

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PIXELS = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 40, "pad_token_id": 1}


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**PIXELS, num_labels=3))


def dinov2() -> Any:
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**PIXELS, num_labels=3))


def siglip() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**PIXELS))


def clip() -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=PIXELS))


def resnet() -> Any:
    config = transformers.ResNetConfig(hidden_sizes=[8] * 4, depths=[1] * 4, embedding_size=8, num_labels=4)
    return transformers.ResNetForImageClassification(config)


def swin() -> Any:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=4
    )
    return transformers.SwinForImageClassification(config)


def bert(**more: Any) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, **more))


def bert_classifier() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3))


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **more))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))


def saved(make: Any, **more: Any) -> Any:
    """Save a model in the folder `model`, with other values than its constructor draws with seed 0."""
    torch.manual_seed(5)
    model = make(**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.5)
    model.save_pretrained("model")
    return model


def loaded(kind: type, folder: str = "out") -> Any:
    model, report = kind.from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [45, 30])
@pytest.mark.parametrize(
    ("make", "more"),
    [
        (bert, {}),
        (llama, {}),
        (llama, {"tie_word_embeddings": True}),
        (gpt2, {}),
        (bert_classifier, {}),
    ],
)
def test_new_rows_equal_resize_token_embeddings(cli: Cli, make: Any, more: dict[str, Any], size: int) -> None:
    model = saved(make, **more)
    done = cli("adapt", "--vocab-size", size, "-m", "./model/", "-o", "out/", "--json").json
    assert done["edits"] == [f"resize . vocab_size={size}"]
    torch.manual_seed(seed_of(0, 1))
    model.resize_token_embeddings(size)
    found = loaded(type(model))
    assert same(found, model)
    assert found.config.get_text_config().vocab_size == size
    again = modelcli.apply(type(model).from_pretrained("model"), f"resize . vocab_size={size}")
    assert same(again, model)


def chinese_clip() -> Any:
    return tiny_model("ChineseCLIPModel")


@pytest.mark.parametrize("size", [120, 30])
@pytest.mark.parametrize("make", [clip, chinese_clip])
def test_new_rows_of_a_pair_equal_those_of_its_text_model(cli: Cli, make: Any, size: int) -> None:
    """transformers names no embedding of the pair, and resizes that of the text model."""
    model = saved(make)
    with pytest.raises(NotImplementedError):
        model.resize_token_embeddings(size)
    done = cli("adapt", "--vocab-size", size, "-m", "./model/", "-o", "out/", "--json").json
    assert done["edits"] == [f"resize . vocab_size={size}"]
    torch.manual_seed(seed_of(0, 1))
    model.text_model.resize_token_embeddings(size)
    model.save_pretrained("expected")  # `from_pretrained` sets the row for padding of ChineseCLIP to zero
    found = loaded(type(model))
    assert same(found, loaded(type(model), "expected"))
    assert found.config.text_config.vocab_size == size
    script = cli("script", "-e", f"resize . vocab_size={size}", "-m", "./model/", "-o", "s.pth").out
    assert f"model.text_model.resize_token_embeddings({size})" in script


def test_ties_stay_and_frozen_parameters_too(cli: Cli) -> None:
    saved(gpt2)
    cli("apply", "-e", "freeze transformer.wte", "-e", "resize . vocab_size=50", "-m", "./model/", "-o", "out.pth")
    rows = {row["name"]: row for row in cli("params", "out.pth", "--json").json["tensors"]}
    assert rows["lm_head.weight"]["tied_to"] == "transformer.wte.weight"
    assert rows["transformer.wte.weight"]["trainable"] is False
    assert rows["transformer.wte.weight"]["shape"] == [50, 16]


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [vit, dinov2, siglip, clip])
@pytest.mark.parametrize("size", [48, 24])
def test_position_embeddings_equal_those_that_the_class_interpolates(cli: Cli, make: Any, size: int) -> None:
    model = saved(make)
    done = cli("adapt", "--image-size", size, "-m", "./model/", "-o", "out/", "--json").json
    assert done["edits"] == [f"resize . image_size={size}"]
    assert [1, 3, size, size] in done["check"]["input"]
    found = loaded(type(model)).eval()
    config = getattr(found.config, "vision_config", found.config)
    assert config.image_size == size
    given = {"pixel_values": torch.randn(2, 3, size, size)}
    if make is clip:
        given["input_ids"] = torch.tensor([[1, 2, 3]])
    model, found = copy.deepcopy(model), copy.deepcopy(found)  # in memory of one alignment: kernels differ by it
    with torch.no_grad():
        expected = model(**given, interpolate_pos_encoding=True).to_tuple()
        pairs = list(zip(found(**given).to_tuple(), expected, strict=True))
    tensors = [(one, other) for one, other in pairs if isinstance(one, torch.Tensor)]
    assert tensors
    assert all(torch.equal(one, other) for one, other in tensors)


@pytest.mark.parametrize("make", [vit, clip, resnet, swin])
@pytest.mark.parametrize("channels", [1, 4])
def test_channels_are_summed_and_the_configuration_says_how_many(cli: Cli, make: Any, channels: int) -> None:
    model = saved(make)
    done = cli("adapt", "--in-channels", channels, "-m", "./model/", "-o", "out/", "--json").json
    assert done["edits"] == [f"resize . in_channels={channels}"]
    assert done["check"]["ran"]
    found = loaded(type(model)).eval()
    assert getattr(found.config, "vision_config", found.config).num_channels == channels
    name = next(name for name, tensor in model.state_dict().items() if tensor.dim() == 4)
    assert torch.equal(found.state_dict()[name], adapted(model.state_dict()[name], channels, "sum"))


def test_a_swin_has_no_tensor_that_the_size_changes(cli: Cli) -> None:
    model = saved(swin)
    done = cli("adapt", "--image-size", 48, "-m", "./model/", "-o", "out/")
    assert ".  image_size=32  ->  image_size=48" in done.out
    found = loaded(type(model))
    assert same(found, model)
    assert found.config.image_size == 48


def test_a_resnet_takes_any_size(cli: Cli) -> None:
    saved(resnet)
    done = cli("adapt", "--image-size", 64, "-m", "./model/", "-o", "out/")
    assert "takes images of 64x64 as it is: no edit is needed" in done.err


def test_a_model_whose_class_does_not_interpolate_is_refused(cli: Cli) -> None:
    config = transformers.ViTMAEConfig(
        **PIXELS,
        decoder_hidden_size=16,
        decoder_num_attention_heads=2,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=16,
    )
    transformers.ViTMAEForPreTraining(config).save_pretrained("model")
    done = cli("adapt", "--in-channels", 1, "-m", "./model/", "-o", "out/", code=2)
    assert "which no sum over channels does" in done.err
    assert not Path("out").exists()


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "head", "stem"),
    [
        (vit, ("classifier",), "vit.embeddings.patch_embeddings.projection"),
        (resnet, ("classifier.1",), "resnet.embedder.embedder.convolution"),
        (bert_classifier, ("classifier",), "bert.embeddings.word_embeddings"),
        (bert, None, "bert.embeddings.word_embeddings"),
        (llama, None, "model.embed_tokens"),
    ],
)
def test_the_head_is_what_the_number_of_labels_changes(make: Any, head: tuple[str, ...] | None, stem: str) -> None:
    found = landmarks.of(make())
    assert found.get("head") == head
    assert found["stem"] == (stem,)


def test_an_edited_model_still_has_its_head(cli: Cli) -> None:
    saved(vit)
    cli("adapt", "--classes", 10, "-m", "./model/", "-o", "out/")
    done = cli("adapt", "--classes", 5, "-m", "./out/", "--json").json
    assert done["edits"] == ["replace classifier Linear(_,5)"]
    cli("replace", "classifier", "Linear(_,10)", "-m", "./model/", "-o", "out.pth")
    assert cli("adapt", "--classes", 5, "-m", "out.pth", "--json").json["edits"] == ["replace classifier Linear(_,5)"]


def test_all_four_at_once(cli: Cli) -> None:
    model = saved(vit)
    cli("adapt", "--classes", 10, "--in-channels", 1, "--image-size", 48, "-m", "./model/", "-o", "out/")
    found = loaded(type(model)).eval()
    config = found.config
    assert (config.num_labels, config.num_channels, config.image_size, len(config.id2label)) == (10, 1, 48, 10)
    assert found(torch.randn(1, 1, 48, 48)).logits.shape == (1, 10)
    cli("adapt", "--classes", 10, "--in-channels", 1, "--image-size", 48, "-m", "./model/", "-o", "out.pth")
    assert same(modelcli.load("out.pth"), found)


@pytest.mark.parametrize(
    ("make", "option", "message"),
    [
        (llama, "--classes", "the library of ./model/ does not say which module of LlamaForCausalLM is the classifier"),
        (resnet, "--vocab-size", "ResNetForImageClassification of ./model/ has no embedding of tokens"),
        (llama, "--image-size", "takes no images"),
        (llama, "--in-channels", "that is no convolution"),
    ],
)
def test_what_does_not_apply_is_an_error(cli: Cli, make: Any, option: str, message: str) -> None:
    saved(make)
    assert message in cli("adapt", option, 7, "-m", "./model/", "-o", "out/", code=2).err
    assert not Path("out").exists()


def test_the_classes_of_detr_are_counted_without_that_for_no_object(cli: Cli, folder: Path) -> None:
    tiny_model("DetrForObjectDetection").save_pretrained(folder / "model")
    cli("adapt", "--classes", "7", "-m", "./model", "-o", "out/")
    found = loaded(transformers.DetrForObjectDetection)
    assert found.config.num_labels == 7
    assert found.class_labels_classifier.out_features == 8

"""What people ask for: the commands that the README gives, compared with plain PyTorch by a forward pass."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import modelcli
from modelcli.live.surgery import seed_of
from tests.cli.test_readme import README, save_dino, steps, world
from tests.conftest import Cli

__all__ = ["world"]  # a fixture

Run = Callable[[str], None]


@pytest.fixture
def run(cli: Cli, world: Path) -> Run:
    """Run the commands that the README shows under a heading, or under a line after `#`: at most four lines."""

    def commands(title: str) -> None:
        section = re.search(rf"^### {re.escape(title)}\n+```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
        lines = section or re.search(rf"^# {re.escape(title)}.*\n((?:.+\n)+?)(?:\n|```)", README, re.MULTILINE)
        assert lines is not None, f"the README has no recipe {title!r}"
        for command, _ in steps(lines[1]):
            cli(*shlex.split(command)[1:])
        assert lines[1].count("\n") <= 4

    return commands


def pretrained() -> nn.Module:
    """The ResNet-18 whose weights are where torchvision downloads them to."""
    return torchvision.models.resnet18(weights="DEFAULT").eval()


def started(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the values that modelcli draws for it by default."""
    torch.manual_seed(0)
    return make().eval()


def same(file: str, expected: nn.Module, *inputs: torch.Tensor, trust: bool = False) -> None:
    """Assert that a file gives the outputs of a model, for the program that loads it with modelcli."""
    found = modelcli.load(file, trust=trust).train(expected.training)
    torch.manual_seed(1)
    one = found(*inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(one, expected(*inputs), rtol=0, atol=0)


def images(channels: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def tokens() -> torch.Tensor:
    return torch.arange(20).reshape(2, 10)


def test_grey_images_into_a_pretrained_resnet(run: Run) -> None:
    run("Grey images into a pretrained ResNet")
    model = pretrained()
    weight = model.conv1.weight.detach().sum(1, keepdim=True)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.conv1.weight.data = weight
    same("grey_sum.pth", model, images(1))


def test_four_channels(run: Run) -> None:
    run("Four channels")
    model, four = pretrained(), images(4)
    assert not torch.equal(modelcli.load("four_channels.pth").eval()(four), model(four[:, :3]))
    four[:, 3] = 0
    torch.testing.assert_close(modelcli.load("four_channels.pth").eval()(four), model(four[:, :3]))


def test_another_number_of_classes(run: Run) -> None:
    run("Another number of classes")
    models, picture = torchvision.models, images(size=96)
    families = {
        "classifier": (models.mobilenet_v3_small(num_classes=10), picture),
        "segmentation": (models.segmentation.lraspp_mobilenet_v3_large(num_classes=10, weights_backbone=None), picture),
        "detection": (
            models.detection.ssdlite320_mobilenet_v3_large(num_classes=10, weights_backbone=None),
            list(picture),
        ),
    }
    for name, (model, given) in families.items():
        model.load_state_dict(torch.load(f"{name}.pth", weights_only=True))
        found = modelcli.load(f"{name}.pth").eval()
        torch.testing.assert_close(found(given), model.eval()(given), rtol=0, atol=0)


def test_another_image_size_for_a_vit(run: Run) -> None:
    timm = pytest.importorskip("timm")
    run("Another image size for a ViT")
    old = started(lambda: timm.create_model("vit_tiny_patch16_224"))
    model = timm.create_model("vit_tiny_patch16_224", img_size=288).eval()
    state = {**old.state_dict(), "pos_embed": timm.layers.resample_abs_pos_embed(old.pos_embed.detach(), [18, 18])}
    model.load_state_dict(state)
    same("vit288.pth", model, images(size=288))


def test_features_without_the_head(run: Run) -> None:
    run("Features without the head")
    model = started(torchvision.models.resnet18)
    model.fc = nn.Identity()
    same("features.pth", model, images())


def test_dropout_before_the_head(run: Run) -> None:
    run("Dropout before the head")
    model = started(torchvision.models.resnet18)
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    same("dropout.pth", model.eval(), images())
    same("dropout.pth", model.train(), images())


def test_lora_wrappers_on_a_vit(cli: Cli, run: Run) -> None:
    run("LoRA wrappers on a ViT")
    model = started(torchvision.models.vit_b_16)
    found = modelcli.load("lora.pth", trust=True).eval()
    picture = images(size=224)[:1]
    assert torch.equal(found(picture), model(picture))  # `up` begins with zeros
    frozen = {name for name, parameter in found.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 2 * 24
    assert all(".base." in name for name in frozen)
    wrapped = found.encoder.layers[0].mlp[0]
    nn.init.ones_(wrapped.up.weight)
    x = torch.randn(2, 768)
    plain = model.encoder.layers[0].mlp[0](x) + wrapped.down(x).sum(-1, keepdim=True)
    torch.testing.assert_close(wrapped(x), plain)


def test_half_the_layers_of_a_bert_and_twice_those_of_a_llama(run: Run) -> None:
    transformers = pytest.importorskip("transformers")
    run("Half the layers of a BERT")
    bert = transformers.BertForSequenceClassification.from_pretrained("bert").eval()
    bert.bert.encoder.layer = nn.ModuleList(bert.bert.encoder.layer[number] for number in (0, 2))
    found = transformers.BertForSequenceClassification.from_pretrained("bert_half").eval()
    assert found.config.num_hidden_layers == 2
    assert torch.equal(found(tokens()).logits, bert(tokens()).logits)
    llama = transformers.LlamaForCausalLM.from_pretrained("llama").eval()
    llama.model.layers = nn.ModuleList(copy.deepcopy(llama.model.layers[number]) for number in (0, 1, 0, 1))
    llama.config.num_hidden_layers = 4
    found = transformers.LlamaForCausalLM.from_pretrained("llama_twice").eval()
    assert torch.equal(found(tokens(), use_cache=False).logits, llama(tokens(), use_cache=False).logits)


def test_one_expert_less(run: Run, world: Path) -> None:
    run("One expert less")
    names: dict[str, type[nn.Module]] = {}
    exec((world / "nets.py").read_text(), names)
    model = started(names["Experts"])
    router = nn.Linear(8, 3)
    router.load_state_dict({name: tensor[:3] for name, tensor in model.router.state_dict().items()})
    model.router, model.experts = router, model.experts[:3]
    same("fewer.pth", model, torch.randn(5, 8), trust=True)


def test_one_expert_less_in_the_files_of_a_mixtral(cli: Cli, world: Path) -> None:
    """Here each layer has its experts as numbered keys, and the configuration says how many there are."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    config = transformers.MixtralConfig(num_hidden_layers=2, vocab_size=60, num_local_experts=4, **size)
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained("mixtral")
    edits = (
        "slice '**.experts' 0-2",
        "split '**.gate.weight' '**.gate.kept' '**.gate.gone' --sizes 3,1",
        "remove '**.gate.gone'",
        "rename '**.gate.kept' '**.gate.weight'",
    )
    Path("fewer").mkdir()
    lines = [word for edit in edits for word in ("-e", edit)]
    cli("apply", "-m", "mixtral/model.safetensors", "-o", "fewer/model.safetensors", *lines)
    config.num_local_experts = 3
    config.save_pretrained("fewer")
    found = transformers.MixtralForCausalLM.from_pretrained("fewer").eval()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data[:3]
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.mlp.experts, name).data = getattr(layer.mlp.experts, name).data[:3]
        layer.mlp.experts.num_experts = layer.mlp.gate.num_experts = 3
    assert torch.equal(found(tokens()).logits, model(tokens()).logits)


def test_the_last_block_from_scratch(run: Run) -> None:
    run("The last block from scratch")
    model = pretrained()
    torch.manual_seed(seed_of(0, 1))
    for module in model.layer4[1].modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    same("fresh_block.pth", model, images())


def test_syncbatchnorm_and_back(run: Run) -> None:
    run("SyncBatchNorm, and back")
    model = started(torchvision.models.resnet18)
    same("no_sync.pth", model, images())
    same("sync.pth", nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), images())
    assert isinstance(modelcli.load("sync.pth").bn1, nn.SyncBatchNorm)


def test_settings_of_normalisation_and_auxiliary_heads_off(run: Run) -> None:
    run("Change settings, and keep some of the layers")
    model = started(torchvision.models.resnet18)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.eps = 0.01, 1e-3
    same("bn.pth", model, images())
    found = modelcli.load("bn.pth").train()
    assert torch.equal(found(images()), model.train()(images()))
    assert torch.equal(found.bn1.running_mean, model.bn1.running_mean)
    heads = started(lambda: torchvision.models.inception_v3(init_weights=False))
    heads.aux_logits, heads.AuxLogits = False, None
    loaded = modelcli.load("no_aux.pth").train()
    heads.load_state_dict(loaded.state_dict())
    torch.manual_seed(1)
    one = loaded(images(size=96))
    torch.manual_seed(1)
    assert torch.equal(one, heads.train()(images(size=96)))


def test_frozen_batchnorm_stays_frozen_in_train_mode(cli: Cli, world: Path, run: Run) -> None:
    cli("replace", "fc", "Linear(_,10)", "-m", "resnet18", "--weights", "DEFAULT", "-o", "head.pth")
    run("Swap normalisation")
    model = modelcli.load("head.pth").eval()
    expected = model(images())
    found = modelcli.load("frozen_bn.pth").train()
    torch.testing.assert_close(found(images()), expected)
    names = [name for name, _ in found.named_parameters() if "bn" in name]
    assert not names
    assert torch.equal(found.bn1.running_mean, model.bn1.running_mean)


def test_qkv_for_another_implementation(run: Run) -> None:
    run("Split qkv for another implementation")
    model = started(lambda: nn.MultiheadAttention(64, 4, batch_first=True))
    apart = torch.load("separate.pth", weights_only=True)
    x = torch.randn(2, 5, 64)
    q, k, v = (
        nn.functional.linear(x, apart[f"{name}.weight"], apart[f"{name}.bias"]).unflatten(-1, (4, 16)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = nn.functional.linear(mixed, apart["out_proj.weight"], apart["out_proj.bias"])
    torch.testing.assert_close(out, model(x, x, x)[0])
    together = torch.load("fused.pth", weights_only=True)
    assert all(torch.equal(together[name], tensor) for name, tensor in model.state_dict().items())


def test_the_conv1d_weights_of_a_gpt2_for_linear_layers(run: Run) -> None:
    transformers = pytest.importorskip("transformers")
    run("The Conv1D weights of a GPT-2 for nn.Linear")
    model = transformers.GPT2LMHeadModel.from_pretrained("gpt2").eval()
    expected = model(tokens()).logits
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            model.set_submodule(path, nn.Linear(*module.weight.shape))
    missing, unexpected = model.load_state_dict(load_file("linear.safetensors"), strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    torch.testing.assert_close(model(tokens()).logits, expected)


def test_weights_of_two_files_in_one(run: Run) -> None:
    run("Weights of two files in one")
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(torchvision.models.resnet18().eval())
    model, other = made
    model.layer4.load_state_dict(other.layer4.state_dict())
    same("both.pth", model, images())


def test_a_dino_backbone_into_a_detector(run: Run) -> None:
    save_dino()
    run("A DINO backbone into a detector")
    model = started(lambda: torchvision.models.detection.fasterrcnn_resnet50_fpn(weights_backbone=None))
    teacher = torch.load("dino.pth", weights_only=True)["teacher"]
    own = {name.removeprefix("backbone."): value for name, value in teacher.items() if name.startswith("backbone.")}
    model.backbone.body.load_state_dict(own)
    found = modelcli.load("detector.pth").eval().backbone(images())
    for name, value in model.backbone(images()).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)

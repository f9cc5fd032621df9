"""The memory of steps: computed by hand for small models, and compared with what autograd and autocast really do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from modelcli.live.inputs import Arguments
from modelcli.live.memory_use import checkpointing
from modelcli.live.memory_use.cuda_dispatch import CudaDispatch
from modelcli.live.memory_use.step import Step, StepPlan, make_step
from modelcli.model.cuda_allocator import CachingAllocator, rounded
from modelcli.model.memory_log import PlainAllocator, Usage, replay

#: The bytes of the tensors of `mlp` in a step with 8 rows.
WEIGHT_1, BIAS_1, WEIGHT_2, BIAS_2 = 4 * 100 * 200, 4 * 200, 4 * 200 * 10, 4 * 10
PARAMS = WEIGHT_1 + BIAS_1 + WEIGHT_2 + BIAS_2
INPUT, HIDDEN, LOGITS, TARGET, SCALAR = 4 * 8 * 100, 4 * 8 * 200, 4 * 8 * 10, 8 * 8, 4


def mlp() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10))


def rows(count: int = 8, width: int = 100) -> Arguments:
    return Arguments((torch.empty(count, width, device="meta"),))


def usage_of(
    module: nn.Module,
    optimizer: str | None,
    inputs: Arguments,
    *,
    autocast: torch.dtype | None = None,
    is_cuda: bool = False,
) -> Usage:
    step = made(module, inputs, StepPlan(optimizer, autocast, is_cuda))
    return replay(step.log.steady(), CachingAllocator() if is_cuda else PlainAllocator())


def made(module: nn.Module, inputs: Arguments, plan: StepPlan) -> Step:
    step = make_step(module, inputs, plan)
    if step.failure is not None:
        raise step.failure.error
    return step


def test_inference_holds_two_layers_at_a_time() -> None:
    usage = usage_of(mlp(), None, rows())
    assert usage.peak.allocated == PARAMS + INPUT + 2 * HIDDEN  # ReLU not in place: its input and its output
    assert usage.peak.path == "1"
    assert usage.whole["activations"] == INPUT + LOGITS
    assert usage.whole["gradients"] == usage.whole["optimizer"] == 0


def test_what_backward_keeps() -> None:
    """The input, the output of the ReLU, the logits and their log softmax, and what the loss has."""
    usage = usage_of(mlp(), "sgd", rows())
    assert usage.whole["activations"] == INPUT + HIDDEN + 2 * LOGITS + TARGET + 2 * SCALAR
    assert usage.whole["params"] == usage.whole["gradients"] == PARAMS
    assert usage.whole["optimizer"] == 0


def test_the_peak_of_sgd_is_the_backward_of_the_first_layer() -> None:
    usage = usage_of(mlp(), "sgd", rows())
    held = PARAMS + INPUT + LOGITS + TARGET + SCALAR  # the user's output, target and loss
    held += SCALAR  # the gradient of the loss, which `backward` begins with
    gradients = WEIGHT_2 + BIAS_2 + HIDDEN + WEIGHT_1 + BIAS_1  # the incoming gradient among them
    assert usage.peak.allocated == held + gradients
    assert (usage.peak.path, usage.peak.phase) == ("0", "backward")
    assert sum(usage.peak.parts.values()) == usage.peak.allocated


def test_momentum_adds_a_copy_of_the_parameters() -> None:
    plain, momentum = usage_of(mlp(), "sgd", rows()), usage_of(mlp(), "sgd-momentum", rows())
    assert momentum.whole["optimizer"] == PARAMS
    assert momentum.peak.allocated == plain.peak.allocated + PARAMS


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_on_the_cpu_updates_one_tensor_after_another(name: str) -> None:
    usage = usage_of(mlp(), name, rows())
    held = 4 * PARAMS + INPUT + LOGITS + TARGET + SCALAR  # parameters, gradients, two moments
    assert usage.whole["optimizer"] == 2 * PARAMS
    assert usage.peak.allocated == held + 2 * WEIGHT_1  # the root of the second moment, and its quotient
    assert (usage.peak.path, usage.peak.phase) == (None, "update")


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_on_cuda_updates_all_tensors_at_once(name: str) -> None:
    """`foreach`, the default there, makes one more copy of all parameters. Each block is rounded to 512 bytes."""
    usage = usage_of(mlp(), name, rows(), is_cuda=True)
    params = sum(map(rounded, (WEIGHT_1, BIAS_1, WEIGHT_2, BIAS_2)))
    held = sum(map(rounded, (INPUT, LOGITS, TARGET, SCALAR)))
    assert usage.peak.allocated == 5 * params + held
    assert usage.whole["optimizer"] == 2 * params
    assert usage.peak.parts["temporary"] == params


def test_a_relu_in_place_keeps_one_copy() -> None:
    with torch.device("meta"):
        separate = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10))
        in_place = nn.Sequential(nn.Linear(100, 200), nn.ReLU(inplace=True), nn.Linear(200, 10))
    assert usage_of(separate, None, rows()).peak.allocated == PARAMS + INPUT + 2 * HIDDEN
    assert usage_of(in_place, None, rows()).peak.allocated == PARAMS + INPUT + HIDDEN + LOGITS


def test_frozen_parameters_have_no_gradients_and_keep_no_activations() -> None:
    frozen = mlp()
    frozen[0].requires_grad_(False)  # type: ignore[index]
    usage = usage_of(frozen, "adam", rows())
    assert usage.whole["gradients"] == WEIGHT_2 + BIAS_2
    assert usage.whole["optimizer"] == 2 * (WEIGHT_2 + BIAS_2)
    # The output of the ReLU is what the last layer needs; the input stays because it is the user's.
    assert usage.whole["activations"] == INPUT + HIDDEN + 2 * LOGITS + TARGET + 2 * SCALAR
    assert usage.peak.allocated < usage_of(mlp(), "adam", rows()).peak.allocated


def test_a_tied_parameter_counts_once() -> None:
    with torch.device("meta"):
        tied = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False))
    tied[1].weight = tied[0].weight
    tokens = Arguments((torch.empty(2, 3, dtype=torch.int64, device="meta"),))
    usage = usage_of(tied, "adam", tokens)
    assert usage.whole["params"] == usage.whole["gradients"] == 4 * 50 * 16
    assert usage.whole["optimizer"] == 2 * 4 * 50 * 16


def test_buffers_are_counted_apart() -> None:
    with torch.device("meta"):
        norm = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    image = Arguments((torch.empty(2, 3, 4, 4, device="meta"),))
    usage = usage_of(norm, "sgd", image)
    assert usage.whole["buffers"] == 2 * 4 * 8 + 8  # mean, variance, and the count of batches
    assert usage.whole["params"] == 4 * 3 * 8 + 2 * 4 * 8


class Block(nn.Module):
    """A block that keeps several activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(x)))


def blocks() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(Block(32) for _ in range(8)))


def test_checkpointing_keeps_the_inputs_of_blocks_alone() -> None:
    plain, saving = blocks(), blocks()
    assert checkpointing.turn_on(saving) == tuple(map(str, range(8)))
    before, after = (usage_of(model, "sgd", rows(256, 32)) for model in (plain, saving))
    one = 4 * 256 * 32
    assert before.whole["activations"] >= 8 * 9 * one  # in each block its input, and two tensors of four times its size
    assert after.whole["activations"] < 12 * one  # the input of each block, the output, the loss
    assert after.whole["activations"] < before.whole["activations"] / 2
    assert after.peak.allocated < before.peak.allocated
    assert {module.path for module in after.modules} == {module.path for module in before.modules}


def test_checkpointing_under_autocast_casts_again() -> None:
    saving = blocks()
    checkpointing.turn_on(saving)
    plain = usage_of(blocks(), "sgd", rows(256, 32), autocast=torch.bfloat16, is_cuda=True)
    after = usage_of(saving, "sgd", rows(256, 32), autocast=torch.bfloat16, is_cuda=True)
    assert after.whole["activations"] < plain.whole["activations"] / 2
    assert after.peak.allocated < plain.peak.allocated


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("resnet18", 8, "layer1.0"),
        ("densenet121", 7, "features.denseblock1"),  # and the transitions between them
        ("swin_t", 15, "features.1.0"),
        ("mobilenet_v3_small", 13, "features.0"),
        ("vit_b_16", 12, "encoder.layers.encoder_layer_0"),
    ],
)
def test_the_blocks_of_known_models(name: str, count: int, first: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    found = checkpointing.turn_on(model)
    assert (len(found), found[0]) == (count, first)


def test_two_steps_in_a_row_are_the_same() -> None:
    model = mlp()
    assert usage_of(model, "adamw", rows()) == usage_of(model, "adamw", rows())


def test_nothing_stays_registered() -> None:
    usage_of(mlp(), "adamw", rows(), autocast=torch.bfloat16, is_cuda=True)
    linear = nn.Linear(3, 4)
    assert linear(torch.ones(1, 3)).dtype == torch.float32
    keys = torch._C._dispatch_tls_local_include_set()
    assert not keys.has(torch._C._dispatch_key_parse("AutocastIPU"))
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::linear", "AutocastIPU")


class Everything(nn.Module):
    """Operators of each list of autocast, and operators that are in none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.layer_norm, self.group_norm = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.linear, self.prelu, self.softplus = nn.Linear(8, 16), nn.PReLU(), nn.Softplus()
        self.dropout, self.bilinear = nn.Dropout(0.1), nn.Bilinear(16, 16, 4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        a = self.norm(self.conv(x)).relu()
        b = self.group_norm(self.deep(functional.interpolate(a, scale_factor=2.0, mode="bilinear")))
        c = self.layer_norm(b.mean((2, 3)))
        d = self.prelu(self.linear(self.dropout(c)))
        e = d @ d.T
        f = torch.einsum("ij,kj->ik", d, d)
        g = (e.softmax(-1) + f.log_softmax(-1)).exp().cumsum(0)
        h = self.softplus(d).pow(2).sum(1) + d.norm(dim=1)
        i = torch.cat([d, c.repeat(1, 2)], 0)
        j = functional.cross_entropy(d, torch.zeros(d.shape[0], dtype=torch.int64, device=d.device))
        return [a, b, c, d, e, f, g, h, i, j, functional.mse_loss(d, d), torch.baddbmm(e[None], e[None], f[None])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_on_a_cuda_device(dtype: torch.dtype) -> None:
    """The truth is autocast of PyTorch itself, on fake tensors that claim to be on a CUDA device."""
    with FakeTensorMode(), torch.device("cuda"):
        real = Everything()
        # `torch.autocast` itself refuses to begin without a GPU. These are the calls that it makes.
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            wanted = real(torch.empty(4, 3, 8, 8))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)
            torch.clear_autocast_cache()
    dispatch = CudaDispatch(dtype)
    with torch.device("meta"):
        model = Everything()
        with dispatch.entered(), dispatch.casting():
            found = model(torch.empty(4, 3, 8, 8))
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in wanted]
    assert [names_in(t.grad_fn) for t in found] == [names_in(t.grad_fn) for t in wanted]


def names_in(node: Any, depth: int = 30) -> list[str]:
    """Return the names of a graph's nodes, from the end to the leaves. cuDNN's BatchNorm keeps what PyTorch's does."""
    if node is None or not depth:
        return []
    return [
        node.name().replace("Cudnn", "Native"),
        *(name for below, _ in node.next_functions for name in names_in(below, depth - 1)),
    ]


def test_autocast_keeps_a_cast_of_each_trained_weight_once() -> None:
    with torch.device("meta"):
        shared = nn.Linear(64, 64, bias=False)
        model = nn.Sequential(shared, nn.ReLU(), shared)
    inputs = Arguments((torch.empty(4, 64, device="meta"),))
    once = usage_of(model, "sgd", inputs, autocast=torch.bfloat16, is_cuda=True)
    plain = usage_of(model, "sgd", inputs, is_cuda=True)
    assert once.whole["params"] == plain.whole["params"]
    half = 2 * 64 * 64
    assert half < once.whole["activations"] - plain.whole["activations"] + 2 * 4 * 4 * 64 < 2 * half


@pytest.mark.parametrize(
    ("dtype", "mask", "wanted"),
    [
        (torch.bfloat16, False, "ScaledDotProductFlashAttention"),
        (torch.bfloat16, True, "ScaledDotProductEfficientAttention"),
        (torch.float32, False, "ScaledDotProductEfficientAttention"),
        (torch.float64, False, "UnsafeView"),
    ],
)
def test_attention_takes_the_kernel_of_cuda(dtype: torch.dtype, mask: bool, wanted: str) -> None:
    dispatch = CudaDispatch()
    query = torch.empty(2, 4, 100, 64, dtype=dtype, device="meta", requires_grad=True)
    given = torch.empty(100, 100, dtype=torch.bool, device="meta") if mask else None
    with dispatch.entered():
        made = functional.scaled_dot_product_attention(query, query, query, attn_mask=given)
        made.sum().backward()
    assert made.shape == query.shape
    assert made.grad_fn is not None
    assert wanted in " ".join(names_in(made.grad_fn, 2))


def test_attention_keeps_no_square_matrix() -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    inputs = Arguments((torch.empty(2, 1024, 64, device="meta"),))
    kept = usage_of(layer, "sgd", inputs, is_cuda=True).whole["activations"]
    assert kept < 4 * 2 * 4 * 1024 * 1024 / 2  # one matrix of attention weights would be 4*2*4*1024*1024 bytes


def test_dropout_keeps_a_mask_of_bytes() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.Dropout(0.5))
    inputs = Arguments((torch.empty(1024, 64, device="meta"),))
    count = 1024 * 256
    kept = {is_cuda: usage_of(model, "sgd", inputs, is_cuda=is_cuda).whole["activations"] for is_cuda in (True, False)}
    assert kept[False] - kept[True] == pytest.approx(3 * count, abs=4096)  # a float32 or a byte for each number

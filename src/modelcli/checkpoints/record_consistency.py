"""Check whether a record can be true: that it agrees with itself, with its tensors, and with the layers of torch.nn.

It does not find what only the code of the model could show; `check` builds the model for that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.paths import parent_of, shown
from modelcli.model.tensors import Shape, TensorInfo


def contradiction(blueprint: Blueprint, *, known_code: bool) -> str | None:
    """Return the first contradiction, worded as a part of a sentence about the record ("it ..."), or None.

    With `known_code` all classes come from known libraries, so that a `Linear` is that of `torch.nn`.
    """
    return next(_contradictions(blueprint, known_code=known_code), None)


def _contradictions(blueprint: Blueprint, *, known_code: bool) -> Iterator[str]:
    yield from _of_modules(blueprint)
    yield from _of_tensors(blueprint)
    if known_code:
        yield from _of_trace(blueprint)
        own: dict[str, list[TensorInfo]] = {}
        for tensor in blueprint.tensors:
            own.setdefault(parent_of(tensor.name), []).append(tensor)
        for module in blueprint.modules:
            yield from _of_layer(module, {t.name.rpartition(".")[2]: t for t in own.get(module.path, ())})
        yield from _of_outputs(blueprint)


def _of_modules(blueprint: Blueprint) -> Iterator[str]:
    """Check that each path occurs once, after the module that contains it."""
    seen: set[str] = set()
    for module in blueprint.modules:
        if module.path in seen:
            yield f"it lists the module {shown(module.path)} twice"
        if module.path and parent_of(module.path) not in seen:
            yield f"it lists the module {module.path}, but not the module that contains it"
        if module.shared_with is not None and module.shared_with not in seen:
            yield f"it shares {module.path} with {shown(module.shared_with)}, which it does not list before"
        seen.add(module.path)


def _of_tensors(blueprint: Blueprint) -> Iterator[str]:
    """Check that each name occurs once, in a listed module, with flags and ties that torch allows."""
    seen: dict[str, TensorInfo] = {}
    for tensor in blueprint.tensors:
        name = tensor.name
        if name in seen:
            yield f"it lists the tensor {name} twice"
        is_bare = (
            blueprint.root.type is None
        )  # a plain state dict may have any keys, such as `.weight`, or one key below another
        if parent_of(name) not in blueprint.by_path and not is_bare:
            yield f"it lists the tensor {name}, but not the module that contains it"
        if name in blueprint.by_path and not is_bare:
            yield f"it lists {name} both as a module and as a tensor"
        if tensor.kind == "buffer" and tensor.requires_grad is not None:
            yield f"it gives the buffer {name} a requires_grad flag"
        if tensor.kind == "parameter" and not tensor.persistent:
            yield f"it lists the parameter {name} as not saved, which only buffers can be"
        if tensor.requires_grad and not tensor.is_differentiable:
            yield f"it lists {name} as trained, which is impossible for {tensor.dtype}"
        if tensor.tied_to is not None:
            first = seen.get(tensor.tied_to)
            if first is None or first.tied_to is not None or (first.shape, first.dtype) != (tensor.shape, tensor.dtype):
                yield f"it ties {name} to {tensor.tied_to}, which has another shape or dtype or does not come before"
        seen[name] = tensor


def _of_trace(blueprint: Blueprint) -> Iterator[str]:
    """Check that the forward pass ran listed modules, including the root."""
    trace = blueprint.trace
    if trace is None:
        return
    if stray := next((path for path in trace.layers if path not in blueprint.by_path), None):
        yield f"it has an output of {stray} in its forward pass, but does not list that module"
    if trace.reason is None and "" not in trace.layers:
        yield "its forward pass ran, but has no output"


# --- layers of torch.nn --------------------------------------------------------------------------------------------

# fmt: off
#: The layers whose tensors are all parameters, and those without tensors of their own.
_PARAMETERS_ALONE = frozenset((
    "Linear", "Bilinear", "Embedding", "EmbeddingBag", "LayerNorm", "GroupNorm", "RMSNorm", "PReLU",
    "MultiheadAttention", "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "Conv1d", "Conv2d", "Conv3d",
    "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
))
_WITHOUT_TENSORS = frozenset((
    "Sequential", "ModuleList", "ModuleDict", "Identity", "Flatten", "Unflatten", "ReLU", "ReLU6", "GELU",
    "SiLU", "ELU", "CELU", "SELU", "LeakyReLU", "Sigmoid", "Tanh", "Softmax", "LogSoftmax", "Softplus",
    "Softsign", "Hardswish", "Hardsigmoid", "Hardtanh", "Mish", "GLU", "Dropout", "Dropout1d", "Dropout2d",
    "Dropout3d", "AlphaDropout", "MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d",
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d",
    "Upsample", "PixelShuffle", "ZeroPad2d", "ReflectionPad2d",
))
# fmt: on
_NORMS = re.compile(r"(Sync)?BatchNorm[123]?d?|InstanceNorm[123]d")
_CONVOLUTIONS = re.compile(r"Conv(Transpose)?([123])d")

#: The tensors that a layer must have according to its settings: the shape of each, by name.
Wanted = Mapping[str, Shape]


def _linear(module: ModuleInfo) -> Wanted | None:
    found = re.fullmatch(r"in_features=(\d+), out_features=(\d+), bias=(True|False)", module.config)
    if found is None:
        return None
    rows, columns = int(found[2]), int(found[1])
    return {"weight": (rows, columns)} | ({"bias": (rows,)} if found[3] == "True" else {})


def _convolution(module: ModuleInfo) -> Wanted | None:
    kind = _CONVOLUTIONS.fullmatch(module.type or "")
    found = re.match(r"(\d+), (\d+), kernel_size=\((\d+(?:, \d+)*),?\)", module.config)
    if kind is None or found is None:
        return None
    inputs, outputs = int(found[1]), int(found[2])
    kernel = tuple(map(int, found[3].split(", ")))
    grouped = re.search(r"groups=(\d+)", module.config)
    groups = int(grouped[1]) if grouped else 1
    if not groups or len(kernel) != int(kind[2]):
        return {"weight": ()}  # no convolution can have such settings
    channels = (inputs, outputs // groups) if kind[1] else (outputs, inputs // groups)
    return {"weight": (*channels, *kernel)} | ({} if "bias=False" in module.config else {"bias": (outputs,)})


def _norm(module: ModuleInfo) -> Wanted | None:
    found = re.match(r"(\d+), eps=.*affine=(True|False), track_running_stats=(True|False)", module.config)
    if found is None:
        return None
    shape = (int(found[1]),)
    wanted: dict[str, Shape] = {}
    if found[2] == "True":
        wanted |= {"weight": shape} | ({} if "bias=False" in module.config else {"bias": shape})
    if found[3] == "True":
        wanted |= {"running_mean": shape, "running_var": shape, "num_batches_tracked": ()}
    return wanted


def _embedding(module: ModuleInfo) -> Wanted | None:
    found = re.match(r"(\d+), (\d+)", module.config)
    return {"weight": (int(found[1]), int(found[2]))} if found else None


def _layer_norm(module: ModuleInfo) -> Wanted | None:
    found = re.match(r"\((\d+(?:, \d+)*),?\), eps=.*elementwise_affine=(True|False)", module.config)
    if found is None:
        return None
    shape = tuple(map(int, found[1].split(", ")))
    if found[2] == "False":
        return {}
    return {"weight": shape} | ({} if "bias=False" in module.config else {"bias": shape})


def _tensors_of(module: ModuleInfo) -> Callable[[ModuleInfo], Wanted | None] | None:
    kind = module.type or ""
    if kind == "Linear":
        return _linear
    if _CONVOLUTIONS.fullmatch(kind):
        return _convolution
    if _NORMS.fullmatch(kind):
        return _norm
    if kind == "Embedding":
        return _embedding
    return _layer_norm if kind == "LayerNorm" else None


def _of_layer(module: ModuleInfo, own: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Check that layers of torch.nn have the tensors, kinds and shapes that their settings require."""
    kind = module.type or ""
    if kind in _WITHOUT_TENSORS and own:
        yield f"it lists {shown(module.path)} as a {kind}, which has no {next(iter(own))}"
    for name, tensor in own.items():
        statistic = name in ("running_mean", "running_var", "num_batches_tracked")
        is_norm = _NORMS.fullmatch(kind) is not None
        if kind in _PARAMETERS_ALONE or is_norm:
            right = "buffer" if is_norm and statistic else "parameter"
            if tensor.kind != right:
                yield f"it lists {tensor.name} as a {tensor.kind}, but in a {kind} it is a {right}"
    makes = _tensors_of(module)
    wanted = None if makes is None else makes(module)
    if wanted is None:
        return
    for name, size in wanted.items():
        if name not in own:
            yield f"it lists {shown(module.path)} as {kind}({module.config}), but without a {name}"
        elif own[name].shape != size:
            has = list(own[name].shape or ())
            yield f"it lists {shown(module.path)} as {kind}({module.config}), but its {name} has the shape {has}"


def _of_outputs(blueprint: Blueprint) -> Iterator[str]:
    """Check that the output of a layer has the width of its weight, and that of a Sequential is its last child's."""
    trace = blueprint.trace
    layers: Mapping[str, Any] = {} if trace is None else trace.layers
    shared = {module.shared_with for module in blueprint.modules if module.shared_with is not None}
    for path, layer in layers.items():
        module, shape = blueprint.by_path[path], layer.output_shape
        if module.type == "Sequential" and (children := blueprint.children.get(path)):
            last = children[-1]
            ran = layers.get(last.path)
            alone = last.shared_with is None and last.path not in shared and path not in shared
            if alone and module.shared_with is None and ran is not None and ran.output_shape != shape:
                yield f"it gives {shown(path)} the output shape {shape}, but its last layer {ran.output_shape}"
        weight = blueprint.by_name.get(f"{path}.weight" if path else "weight")
        if weight is None or not weight.shape or not isinstance(shape, list) or not all(type(n) is int for n in shape):
            continue
        axis, width = _width(module, weight.shape)
        if axis is not None and (len(shape) < abs(axis) or shape[axis] != width):
            yield f"it gives {shown(path)} the output shape {shape}, but a weight of shape {list(weight.shape)}"


def _width(module: ModuleInfo, weight: Shape) -> tuple[int | None, int]:
    """Return the axis of a layer's output that has its features (None if not known), and their number."""
    kind = module.type or ""
    if kind == "Linear":
        return -1, weight[0]
    if kind == "Embedding":
        return -1, weight[-1]
    found = _CONVOLUTIONS.fullmatch(kind)
    if found is None or found[1]:  # for a transposed convolution the number depends on its groups too
        return None, 0
    return -1 - int(found[2]), weight[0]

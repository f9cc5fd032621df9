"""torchvision: its builders, and how to build them without downloading anything; its module classes and operators."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import urllib.error
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from modelcli.errors import RequestError, SystemFailureError, did_you_mean
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.language.references import NamedModel, Reference
from modelcli.live import bounds, modules, signatures
from modelcli.live.build import Architecture
from modelcli.live.inputs import Inputs
from modelcli.live.providers import torchvision_detection
from modelcli.live.providers.base import ClassLayers, Layout, LiveProvider, refuse_hole
from modelcli.live.resizing import Resizing
from modelcli.live.surgery.layouts import NORM_OVER_CHANNELS
from modelcli.providers.known_code import runs_known_code
from modelcli.providers.published import PublishedModel
from modelcli.providers.torchvision import MODELS, OPS

if TYPE_CHECKING:
    from modelcli.live.mult_adds import Formula
    from modelcli.live.script.source_text import SourceText

#: Kept for as long as the process lives: the schemas go when the library goes.
_schemas: list[torch.library.Library] = []


@cache
def torchvision() -> ModuleType:
    """Import torchvision, also beside a torch that its compiled operators do not match.

    There the import itself fails, because a fake kernel is registered for an operator that was not loaded. Its
    schema alone is enough for the import and for every builder.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
    return importlib.import_module("torchvision")


def builder_names() -> list[str]:
    """Every name that `torchvision.models.list_models()` gives."""
    names: list[str] = torchvision().models.list_models()
    return names


def describe(name: str) -> PublishedModel:
    """Gather a builder's group, weights and published figures; nothing is built."""
    models = torchvision().models
    entries = list(models.get_model_weights(name))
    default = models.get_model_weights(name).DEFAULT if entries else None
    operations = default.meta.get("_ops") if default else None
    group = models.get_model_builder(name).__module__.split(".")[2:]
    return PublishedModel(
        name=name,
        group=group[0] if len(group) > 1 else "classification",
        weights=tuple(entry.name for entry in entries),
        params=default.meta.get("num_params") if default else None,
        macs=None if operations is None else round(operations * 1e9),
    )


def arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], weights: str | None) -> dict[str, Any]:
    """The keyword arguments of a builder, with no weights but those that were asked for.

    Raises RequestError for positional arguments, for weights that are no name of its own, and for wrong names.
    """
    builder = torchvision().models.get_model_builder(name)
    if args:
        raise RequestError(f"{name} takes keyword arguments only", f"write {name}(num_classes=10)")
    for reserved in ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress"):
        if kwargs.get(reserved) is not None:
            raise RequestError(
                f"{name}: {reserved} is not an argument here", "--weights says where the values come from"
            )
    made = {key: value for key, value in kwargs.items() if value is not None or key != "weights"}
    parameters = signatures.of(builder).parameters
    if "weights_backbone" in parameters:
        made["weights_backbone"] = None
    made["weights"] = None if weights is None else check_weights(name, weights, quantize=bool(kwargs.get("quantize")))
    return made


def check_weights(name: str, weights: str, *, quantize: bool = False) -> str:
    """The name of a builder's weights with `DEFAULT` resolved. Raises RequestError for one it does not have."""
    entries = _weights_enum(name, quantize)
    try:
        resolved: str = entries[weights.rpartition(".")[2]].name
    except KeyError:
        names = ["DEFAULT", *(entry.name for entry in entries)]
        hint = did_you_mean(weights, names) or ""
        raise RequestError(f"{name} has no weights {weights!r}", f"{hint} it has {', '.join(names)}".strip()) from None
    return resolved


def _weights_enum(name: str, quantize: bool) -> Any:
    """The enum of weights that fit: a quantizable builder that is not quantized takes those of its plain twin."""
    models = torchvision().models
    plain = name.removeprefix("quantized_")
    if plain != name and not quantize and plain in builder_names():
        name = plain
    return models.get_model_weights(name)


def constructor(name: str) -> Callable[..., nn.Module]:
    """A builder, to be called with `arguments()`.

    With a weights name the call downloads, into torchvision's own cache, what is not there yet, and raises
    SystemFailureError where that fails.
    """
    builder = torchvision().models.get_model_builder(name)

    def build(**kwargs: Any) -> nn.Module:
        try:
            with _quiet():
                module: nn.Module = builder(**kwargs, progress=sys.stderr.isatty())
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise SystemFailureError(
                f"cannot download the weights {kwargs['weights']} of {name}: {getattr(error, 'reason', error)}",
                "give a file instead, --weights FILE, or put it where torchvision's cache looks",
            ) from None
        return module

    return build


def without_weights(name: str) -> Callable[..., nn.Module]:
    """A builder as a function of its keyword arguments that draws its values, and downloads nothing."""

    @functools.wraps(torchvision().models.get_model_builder(name))
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        return constructor(name)(**arguments(name, args, kwargs, None))

    return build


def signature(name: str) -> str:
    """What a builder takes: its own arguments, and those that it hands on to the class of its model.

    What that class has no default for (`block`, `layers`) the builder decides.
    """
    hidden = {"weights", "weights_backbone", "progress"}
    taken = [
        parameter
        for parameter in parameters_of(name)
        if parameter.name not in hidden and parameter.default is not parameter.empty
    ]
    return f"{name}({', '.join(map(_shown, taken))})"


def parameters_of(name: str) -> list[inspect.Parameter]:
    """The arguments of a builder's model by keyword: of its class, with what the builder itself says of them."""
    builder = torchvision().models.get_model_builder(name)
    made = inspect.get_annotations(builder).get("return")
    kinds = [builder, made] if inspect.isclass(made) else [builder]
    taken = {
        parameter.name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for kind in reversed(kinds)
        for parameter in signatures.of(kind).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    return list(taken.values())


def references_of(name: str) -> list[str]:
    """The builder, and it with those arguments that its published weights may have been made with.

    These are auxiliary heads (most files of googlenet have none, and those of segmentation models have one) and, for
    vision transformers, the size of the images.
    """
    taken = {parameter.name for parameter in parameters_of(name.removeprefix("quantized_"))}
    found = [name]
    found += [
        f"{name}({heads}={flag})" for heads, flag in (("aux_logits", False), ("aux_loss", True)) if heads in taken
    ]
    if "image_size" in taken:
        sizes = {crop[-1] for entry in _weights_enum(name, quantize=False) if (crop := _crop_size(entry))}
        found += [f"{name}(image_size={size})" for size in sorted(sizes - {224})]
    return found


def _crop_size(entry: Any) -> list[int] | None:
    """The size that the preprocessing of these weights cuts images to."""
    size: list[int] | None = getattr(entry.transforms(), "crop_size", None)
    return size


def _shown(parameter: inspect.Parameter) -> str:
    """An argument with its type, where that is no longer than a few words."""
    text = str(parameter)
    return text if len(text) <= 40 else str(parameter.replace(annotation=parameter.empty))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torchvision warns about its own defaults (`init_weights` of googlenet); no user of ours can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        yield


@contextlib.contextmanager
def architecture_only() -> Iterator[None]:
    """Let builders with a weights name give the architecture of those weights, and neither download nor load them."""
    weights_enum = importlib.import_module("torchvision.models._api").WeightsEnum
    sentinel: dict[str, Any] = _NoWeights()
    original_get = weights_enum.get_state_dict
    original_load = nn.Module.load_state_dict

    def load(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(state_dict, _NoWeights):
            return None
        return original_load(self, state_dict, *args, **kwargs)

    weights_enum.get_state_dict = lambda *_args, **_kwargs: sentinel
    nn.Module.load_state_dict = load  # type: ignore[method-assign]
    try:
        with _quiet():
            yield
    finally:
        weights_enum.get_state_dict = original_get
        nn.Module.load_state_dict = original_load  # type: ignore[method-assign]


class _NoWeights(dict[str, Any]):
    """Stands for a state dict that was never read."""


#: The shorter side that torchvision's detection models scale an image to.
_IMAGE_SIDE = 800
#: Frames of the clips on which torchvision measured its video models.
_CLIP_FRAMES = 16


def input_sizes(name: str, weights: str | None, module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """The input that a builder is known to take, batch included: that of its weights' own preprocessing.

    Detection models take a list of images without a batch, RAFT two images. A model that states its own
    `image_size` takes that.
    """
    info = describe(name)
    entries = _weights_enum(name, quantize=False)
    entry = entries[weights] if weights in entries.__members__ else next(iter(entries), None)
    match info.group:
        case "detection":
            transform: Any = getattr(module, "transform", None)
            height, width = getattr(transform, "fixed_size", None) or (_IMAGE_SIDE, _IMAGE_SIDE)
            return ((3, height, width),)
        case "optical_flow":
            return ((1, 3, 520, 960), (1, 3, 520, 960))
    size = 224
    if entry is not None:
        transforms = entry.transforms()
        given = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
        if given:
            size = int(given[-1])
    if isinstance(own := getattr(module, "image_size", None), int):
        size = own
    if info.group == "video":
        return ((1, 3, _CLIP_FRAMES, size, size),)
    return ((1, 3, size, size),)


def takes_list_of_images(name: str) -> bool:
    return describe(name).group == "detection"


# --- its module classes ----------------------------------------------------------------------------------------------


def _classes_in_models(name: str) -> dict[str, type[nn.Module]]:
    """The module classes of this name that its models have, by where they are defined."""
    torchvision()
    found: dict[str, type[nn.Module]] = {}
    for module, loaded in sorted(sys.modules.items()):
        kind = getattr(loaded, name, None) if module.startswith(f"{MODELS}.") else None
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module:
            found[module] = kind
    return found


def _builder_named(package: str, name: str) -> str | None:
    """The builder that `torchvision.models:resnet18` or `torchvision.models.resnet:resnet18` names."""
    if package != MODELS and not package.startswith(f"{MODELS}."):
        return None
    builder = name if name in builder_names() else f"quantized_{name}"
    if builder not in builder_names():
        return None
    home = torchvision().models.get_model_builder(builder).__module__
    return builder if home == package or home.startswith(f"{package}.") else None


def _deform_conv2d(_input: torch.Tensor, weight: torch.Tensor, *_args: Any, out: Any, **_kwargs: Any) -> int:
    """As a convolution; where it samples, and its mask, are elementwise."""
    return int((out if isinstance(out, torch.Tensor) else out[0]).numel()) * weight[0].numel()


#: The layers whose width is the number of classes, by the class of the model: those that `num_classes=` changes.
#: `torchvision_detection` has those of detection models, whose width is not the number of classes alone.
_HEADS: Mapping[str, tuple[str, ...]] = {
    "AlexNet": ("classifier.6",),
    "ConvNeXt": ("classifier.2",),
    "DeepLabV3": ("classifier.4", "aux_classifier.4"),
    "DenseNet": ("classifier",),
    "EfficientNet": ("classifier.1",),
    "FCN": ("classifier.4", "aux_classifier.4"),
    "GoogLeNet": ("fc", "aux1.fc2", "aux2.fc2"),
    "Inception3": ("fc", "AuxLogits.fc"),
    "LRASPP": ("classifier.low_classifier", "classifier.high_classifier"),
    "MNASNet": ("classifier.1",),
    "MViT": ("head.1",),
    "MaxVit": ("classifier.5",),
    "MobileNetV2": ("classifier.1",),
    "MobileNetV3": ("classifier.3",),
    "RegNet": ("fc",),
    "ResNet": ("fc",),
    "S3D": ("classifier.1",),
    "ShuffleNetV2": ("fc",),
    "SqueezeNet": ("classifier.1",),
    "SwinTransformer": ("head",),
    "SwinTransformer3d": ("head",),
    "VGG": ("classifier.6",),
    "VideoResNet": ("fc",),
    "VisionTransformer": ("heads.head",),
}
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def _kinds(module: nn.Module) -> list[str]:
    """Return the names of a model's classes that are torchvision's, the nearest first."""
    return [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith(f"{MODELS}.")]


class LiveTorchvision(LiveProvider):
    """The builders by their bare names, and the classes of `torchvision.ops` and of the models in expressions."""

    operator_libraries = frozenset({"torchvision"})
    layer_kinds = dict.fromkeys(("FrozenBatchNorm2d", "LayerNorm2d"), NORM_OVER_CHANNELS)
    batch_norms: ClassVar[Mapping[str, tuple[str, ...]]] = {"torchvision.ops.misc.FrozenBatchNorm2d": ()}

    def names(self) -> list[str]:
        """See `builder_names`."""
        return builder_names()

    def published(self, name: str) -> PublishedModel:
        """See `describe`."""
        return describe(name)

    def variants(self, name: str) -> list[str]:
        """See `references_of`."""
        return references_of(name)

    def takes(self, reference: Reference) -> bool:
        """Whether it names a builder. Its source says so: an expression of `torch.nn` needs no torchvision."""
        return isinstance(reference, NamedModel) and reference.call.name in self.provider.names()

    def landmarks(self, module: nn.Module) -> Mapping[str, Sequence[str]]:
        """The classifiers of its models, auxiliary ones included, and their first convolution."""
        heads = next((_HEADS[kind] for kind in _kinds(module) if kind in _HEADS), None)
        if heads is None and (found := self.class_layers(module, 1)) is not None:
            heads = tuple(layer.path for layer in found.layers)
        if heads is None:
            return {}
        stem = next((path for path, child in module.named_modules() if isinstance(child, _CONVOLUTIONS)), None)
        return {"head": heads, "stem": () if stem is None else (stem,)}

    def class_layers(self, module: nn.Module, number: int) -> ClassLayers | None:
        """What gives a detection model another number of classes, the background included."""
        return torchvision_detection.class_layers(_kinds(module), module, number)

    def prepare(self) -> None:
        """Import torchvision."""
        torchvision()

    def architecture(
        self, reference: Reference, *, weights: str | None, folder: Path, trust: bool, remote_code: bool = False
    ) -> Architecture:
        """A builder, with the weights of that name. Raises RequestError for arguments and weights it does not have."""
        assert isinstance(reference, NamedModel)
        call = reference.call
        refuse_hole(reference)
        values = {key: modules.value_of(value, trusted=trust) for key, value in call.kwargs.items()}
        kwargs = arguments(call.name, call.args, values, weights)
        build, described = constructor(call.name), signature(call.name)
        modules.check_flags({taken.name: taken for taken in parameters_of(call.name)}, values, str(reference))

        def plain() -> nn.Module:
            try:
                return modules.construct(build, [], kwargs, str(reference), described)
            except modules.ConstructorError as error:
                if kwargs["weights"] is not None and isinstance(error.error, ValueError) and call.kwargs:
                    error.hint = (
                        f"{kwargs['weights']} fits {call.name} as it is: "
                        f"-m {call.name} --weights {quoted(kwargs['weights'])}, and replace what is to have "
                        "another size"
                    )
                raise

        def without_weights() -> nn.Module:
            with architecture_only():
                return plain()

        return Architecture(
            reference,
            plain,
            without_weights,
            self,
            weights=kwargs["weights"],
            pretrained=bool(describe(call.name).weights),
            bounds=bounds.as_typed(str(reference)) if runs_known_code(reference) else None,
        )

    def resizing(self, module: nn.Module, what: str, size: int) -> Resizing | None:
        """The position embeddings of its vision transformers, by its `interpolate_embeddings`."""
        if what != "image_size" or not _is_vision_transformer(module):
            return None
        return vision_transformer_resizing(module, size)

    def inputs(self, architecture: Architecture, module: nn.Module) -> Inputs:
        """See `input_sizes`."""
        name = _name_of(architecture)
        return Inputs(input_sizes(name, architecture.weights, module), as_list=takes_list_of_images(name))

    def layout_behind(self, module: nn.Module, axes: int) -> Layout | None:
        """`Permute` moves channels to the end or back."""
        dims = getattr(module, "dims", None)
        if type(module).__name__ != "Permute" or not isinstance(dims, list | tuple) or len(dims) != axes or axes <= 2:
            return None
        return "channels first" if dims[1] == axes - 1 else "features last" if dims[-1] == 1 else None

    def formulas(self) -> Mapping[str, Formula]:
        """The one operator of its own that multiplies."""
        return {"torchvision::deform_conv2d": _deform_conv2d}

    def expression(self, text: SourceText, architecture: Architecture, folder: Path) -> str:
        """`models.resnet18(num_classes=10)`; a builder that is no attribute of `models` goes by its name."""
        name = _name_of(architecture)
        assert isinstance(architecture.reference, NamedModel)
        given = dict(architecture.reference.call.kwargs)
        if architecture.weights is not None:
            given["weights"] = architecture.weights
        models = torchvision().models
        builder = models.get_model_builder(name)
        if "weights_backbone" in signatures.of(builder).parameters:
            given["weights_backbone"] = None
        text.imports.add("from torchvision import models")
        if getattr(models, name, None) is builder:
            return f"models.{name}({text.arguments((), given)})"
        return f"models.get_model({text.arguments((name,), given)})"

    def find_class(self, package: str, name: str) -> object:
        """A class of `torchvision.ops` or of the models; by its bare name, one that the models have just once."""
        if package not in ("", OPS):
            torchvision()
            return getattr(sys.modules.get(package), name, None)
        found: object = getattr(torchvision().ops, name, None)
        if found is None and not package and len(classes := _classes_in_models(name)) == 1:
            return next(iter(classes.values()))
        return found

    def find_function(self, package: str, name: str) -> Callable[..., nn.Module] | None:
        """A builder as a function, without weights."""
        builder = _builder_named(package, name)
        return None if builder is None else without_weights(builder)

    def class_names(self) -> Sequence[str]:
        """Those of `torchvision.ops`."""
        return modules.classes_in(torchvision().ops)

    def package_of(self, name: str) -> str | None:
        """`torchvision.ops`, or the module of the models that defines the class."""
        return OPS if hasattr(torchvision().ops, name) else next(iter(_classes_in_models(name)), None)

    def places_of(self, name: str) -> Sequence[str]:
        """Classes of the models."""
        return [f"{module}:{name}" for module in _classes_in_models(name)]

    def right_name(self, call: Call) -> str | None:
        """A builder that was named as Python does: `torchvision.models.resnet18`."""
        package, _, name = call.name.rpartition(".")
        if package.split(".")[0] not in ("torchvision", "models") or name not in builder_names():
            return None
        return f"torchvision's models go by their names: {NamedModel(replace(call, name=name))}"

    def name_in_script(self, package: str, name: str) -> tuple[str, str]:
        """`ops.MLP`, `torchvision.models.detection.faster_rcnn.FastRCNNPredictor`."""
        if package == OPS:
            return "from torchvision import ops", f"ops.{name}"
        return super().name_in_script(package, name)

    def arguments_in_script(self, package: str, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """With `weights_backbone=None` where a builder's own default downloads some."""
        builder = _builder_named(package, name)
        if builder is None or "weights_backbone" not in signatures.of(without_weights(builder)).parameters:
            return kwargs
        return {**kwargs, "weights_backbone": None}


def _is_vision_transformer(module: nn.Module) -> bool:
    home = sys.modules.get(f"{MODELS}.vision_transformer")
    return home is not None and isinstance(module, home.VisionTransformer)


def vision_transformer_resizing(model: Any, size: int) -> Resizing:
    """How a vision transformer takes images of another size.

    Raises RequestError for a size that the patches do not divide.
    """
    patch = int(model.patch_size)
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        raise RequestError(
            f"image_size={size} is no multiple of the patches of {patch} pixels", f"{below or above} and {above} are"
        )
    tokens = (size // patch) ** 2 + 1

    def resize(module: Any) -> None:
        from torchvision.models.vision_transformer import interpolate_embeddings

        name = "encoder.pos_embedding"
        old = module.encoder.pos_embedding
        state = interpolate_embeddings(size, patch, OrderedDict({name: old.detach()}))
        module.encoder.pos_embedding = nn.Parameter(state[name], requires_grad=old.requires_grad)
        module.image_size, module.seq_length = size, tokens

    def statements(text: SourceText, place: str) -> list[str]:
        text.imports.add("from torchvision.models.vision_transformer import interpolate_embeddings")
        text.imports.add("from torch import nn")
        name = "encoder.pos_embedding"
        return [
            f'new = interpolate_embeddings({size}, {patch}, {{"{name}": {place}.{name}.detach()}})',
            f'{place}.{name} = nn.Parameter(new["{name}"])',
            f"{place}.image_size, {place}.seq_length = {size}, {tokens}",
        ]

    return Resizing(int(model.image_size), resize, statements)


def _name_of(architecture: Architecture) -> str:
    assert isinstance(architecture.reference, NamedModel)
    return architecture.reference.call.name

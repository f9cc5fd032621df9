"""The torch half of the provider `timm`: see `modelcli.providers.timm`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from modelcli.errors import RequestError, did_you_mean
from modelcli.language.expressions import Call
from modelcli.language.references import NamedModel, Reference
from modelcli.live import bounds, modules
from modelcli.live import loading as live_loading
from modelcli.live.build import Architecture
from modelcli.live.inputs import Inputs
from modelcli.live.loading import StateDict
from modelcli.live.providers.base import FittedStateDict, LiveProvider, ModelFolder, refuse_hole
from modelcli.live.providers.timm import loading, saving
from modelcli.live.providers.timm.building import RESERVED, TimmModel
from modelcli.live.resizing import Resizing
from modelcli.live.surgery.layouts import NORM_OVER_CHANNELS
from modelcli.providers.known_code import runs_known_code
from modelcli.providers.published import PublishedModel

if TYPE_CHECKING:
    from modelcli.checkpoints import Contents
    from modelcli.live.script.source_text import SourceText

#: The keys of a training checkpoint under which timm looks for a state dict; None is the whole file.
_KEYS_OF_TIMM = (None, ("state_dict_ema",), ("model_ema",), ("state_dict",), ("model",))
#: The name of weights of a model whose only pretrained weights have no tag.
UNTAGGED = "DEFAULT"


class LiveTimm(LiveProvider):
    """Builds models with `timm.create_model`."""

    layer_kinds = dict.fromkeys(
        ("LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d", "LayerNormAct2d", "RmsNorm2d", "SimpleNorm2d"),
        NORM_OVER_CHANNELS,
    )
    batch_norms: ClassVar[Mapping[str, tuple[str, ...]]] = {
        f"timm.layers.norm_act.{name}": ("drop", "act")
        for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
    }

    # --- its models --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Import timm, which takes seconds."""
        self.require_installed()
        importlib.import_module("timm")

    def names(self) -> Sequence[str]:
        """What `timm.list_models()` gives; none where timm is not installed."""
        if not self.provider.is_installed:
            return ()
        import timm

        names: list[str] = timm.list_models()
        return names

    def published(self, name: str) -> PublishedModel:
        """The file of timm that the model is in, the tags of its pretrained weights, and the size of its images."""
        from timm.models import get_pretrained_cfg, model_entrypoint

        module = model_entrypoint(name).__module__.rpartition(".")[2]
        configured = get_pretrained_cfg(name)
        size = None if configured is None else tuple(configured.input_size)
        return PublishedModel(name, group=module, weights=weights_of(name), input_size=size)

    def architecture(
        self, reference: Reference, *, weights: str | None, folder: Path, trust: bool, remote_code: bool = False
    ) -> Architecture:
        """A model by its name, or that of a folder, with pretrained weights by their tag.

        Raises RequestError for names, weights and arguments that timm does not have.
        """
        assert isinstance(reference, NamedModel)
        refuse_hole(reference)
        self.prepare()
        call, text = reference.call, str(reference)
        is_known = runs_known_code(reference)
        if not trust and not is_known:
            raise modules.untrusted(text)
        named = self.described(reference, folder, trust=trust)
        notes: tuple[str, ...] = ()
        tags: tuple[str, ...] = ()
        if not _is_folder(named):
            tags, notes = self._known_weights(call.name)
        tag = None if weights is None else self._tag(call.name, weights, tags)
        built = named if tag is None else named.with_weights("" if tag == UNTAGGED else tag)
        return Architecture(
            reference,
            partial(modules.construct, built.create if tag is None else built.create_pretrained, [], {}, text),
            partial(modules.construct, built.create, [], {}, text),
            self,
            weights=tag,
            pretrained=bool(tags) or _is_folder(named),
            bounds=bounds.as_typed(text) if is_known or _is_folder(named) else None,
            folder=folder,
            notes=notes,
        )

    def described(self, reference: NamedModel, folder: Path, *, trust: bool = False) -> TimmModel:
        """What timm is called with for a reference, without pretrained weights.

        Args:
            reference: the model, of this provider.
            folder: what the path of a folder is seen from.
            trust: whether its arguments may name code that no known library vouches for.

        Raises RequestError for arguments that are for modelcli to decide.
        """
        call, text = reference.call, str(reference)
        if call.args:
            raise RequestError(f"{text}: timm takes keyword arguments only", f"write {call.name}(num_classes=10)")
        values = {key: modules.value_of(value, trusted=trust) for key, value in call.kwargs.items()}
        for name, instead in RESERVED.items():
            if values.pop(name, None):
                raise RequestError(f"{text}: {name} is not an argument here", instead)
        own = self.provider.own_folder(call.name, folder)
        name = call.name if own is None else f"local-dir:{own.resolve()}"
        return TimmModel(name, values, text)

    def _known_weights(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tags of a model's pretrained weights, and a note where timm has given the model another name.

        Raises RequestError where timm has no such model, or no such tag of it.
        """
        from timm.models import _registry, get_deprecated_models, is_model

        architecture, _, tag = name.partition(".")
        if not is_model(architecture):
            hint = did_you_mean(architecture, self.names()) or "modelcli list 'timm:*' shows them all"
            if "/" in name or "\\" in name:
                hint = "there is no such folder either"
            raise RequestError(f"timm has no model {name!r}", hint)
        if architecture in (deprecated := get_deprecated_models()):
            newer = deprecated[architecture]
            if newer is None:
                raise RequestError(f"timm has removed the model {architecture!r}")
            return weights_of(newer.partition(".")[0]), (f"timm calls {architecture} {newer} now",)
        known = [full.partition(".")[2] for full in _registry._model_with_tags[architecture]]
        if tag and tag not in known:
            hint = f"{did_you_mean(tag, known) or ''} it has {', '.join(filter(None, known))}".strip()
            raise RequestError(f"timm's {architecture} has no tag {tag!r}", hint)
        return weights_of(architecture), ()

    def _tag(self, name: str, weights: str, tags: Sequence[str]) -> str:
        """The tag of a model's weights. `DEFAULT` is the tag in the name, else timm's own choice.

        Raises RequestError for weights that the model does not have.
        """
        architecture, _, own = name.partition(".")
        if not tags:
            raise RequestError(f"timm:{architecture} has no pretrained weights", "give a file: --weights FILE")
        if weights == "DEFAULT":
            weights = own or tags[0]
        if weights not in tags:
            known = list(dict.fromkeys(["DEFAULT", *tags]))
            hint = f"{did_you_mean(weights, known) or ''} it has {', '.join(known)}".strip()
            raise RequestError(f"timm:{architecture} has no weights {weights!r}", hint)
        return weights

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def fit_state_dict(self, architecture: Architecture, module: nn.Module, state: StateDict) -> FittedStateDict:
        """Adapt a checkpoint as timm adapts pretrained weights."""
        assert isinstance(architecture.reference, NamedModel)
        return loading.fit(self.described(architecture.reference, architecture.folder), module, state)

    def model_folder(self, architecture: Architecture, module: nn.Module, folder: Path | None) -> ModelFolder | None:
        """The folder that `timm.create_model("local-dir:...")` takes, where the model still is one of timm."""
        from modelcli.live import landmarks

        return saving.model_folder(module, landmarks.existing(module, self.landmarks(module)), folder)

    def describe_edits(self, architecture: Architecture, module: nn.Module) -> None:
        """Let the model say how many classes it has: timm's own functions, and programs that train it, ask for that."""
        if (found := self._classes_to_say(module)) is not None:
            classes, paths = found
            for path in paths:
                vars(module.get_submodule(path))["num_classes"] = classes

    def script_of_edits(self, text: SourceText, architecture: Architecture, module: nn.Module) -> list[str]:
        """`model.num_classes = 10`."""
        from modelcli.live.script import access_paths

        if (found := self._classes_to_say(module)) is None:
            return []
        classes, paths = found
        return [f"{access_paths.module_expression(module, path)}.num_classes = {classes}" for path in paths]

    def _classes_to_say(self, module: nn.Module) -> tuple[int, list[str]] | None:
        from modelcli.live import landmarks

        return saving.numbers_of_classes(module, landmarks.existing(module, self.landmarks(module)))

    def recorded_reference(self, architecture: Architecture) -> str:
        """The model by its name; of a folder with the arguments that its configuration says."""
        assert isinstance(architecture.reference, NamedModel)
        if not _is_folder(self.described(architecture.reference, architecture.folder)):
            return str(architecture.reference)
        name, arguments = saving.recorded_call(architecture.on_meta(0))
        return f"{self.provider.prefix}:{Call(name, (), arguments)}"

    # --- what flows in, and what its parts are -----------------------------------------------------------------------

    def inputs(self, architecture: Architecture, module: nn.Module) -> Inputs | None:
        """An image, of the size and the channels that timm says of the model as it was built."""
        from timm.models._input import get_model_input_config

        if not hasattr(module, "pretrained_cfg"):
            return None
        channels, *size = get_model_input_config(module)["input_size"]
        reference = architecture.reference
        if isinstance(reference, NamedModel) and isinstance(given := reference.call.kwargs.get("in_chans"), int):
            channels = given
        return Inputs(((1, channels, *size),))

    def landmarks(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
        """The classifier (`head`) and the first convolution or embedding (`stem`) that timm's configuration names."""
        if "timm" not in sys.modules:
            return {}
        from timm.models._input import get_model_traits

        configured = getattr(module, "pretrained_cfg", None)
        if not isinstance(configured, Mapping):
            return {}
        stem = get_model_traits(module).get("first_conv", configured.get("first_conv"))
        found = {"head": _paths(configured.get("classifier")), "stem": _paths(stem)}
        return {word: paths for word, paths in found.items() if paths}

    def resizing(self, module: nn.Module, what: str, size: int) -> Resizing | None:
        """The image size of a model that has `set_input_size`."""
        if what != "image_size" or not self.landmarks(module) or not hasattr(module, "set_input_size"):
            return None
        return image_resizing(module, size)

    def why_not_resized(self, module: nn.Module, what: str, size: int) -> str | None:
        """Which tensors timm makes anew for another image size."""
        if what != "image_size" or not self.landmarks(module):
            return None
        from modelcli.live.providers.timm import image_sizes

        return image_sizes.why_not(module, size)

    # --- scripts and classes -----------------------------------------------------------------------------------------

    def expression(self, text: SourceText, architecture: Architecture, folder: Path) -> str:
        """`timm.create_model('resnet50.a1_in1k', pretrained=True, num_classes=10)`."""
        assert isinstance(architecture.reference, NamedModel)
        named = self.described(architecture.reference, folder)
        given = dict(architecture.reference.call.kwargs)
        name = named.name
        if architecture.weights is not None:
            name = named.with_weights("" if architecture.weights == UNTAGGED else architecture.weights).name
            given["pretrained"] = True
        if _is_folder(named):
            name = f"local-dir:{architecture.reference.call.name}"
        text.imports.add("import timm")
        return f"timm.create_model({text.arguments((name,), given)})"

    def expression_with_weights(
        self, text: SourceText, architecture: Architecture, module: nn.Module, folder: Path
    ) -> str | None:
        """`timm.create_model("local-dir:runs/model", pretrained=True)`, which gives a model in float32."""
        if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in module.state_dict().values()):
            return None
        assert isinstance(architecture.reference, NamedModel)
        given = {**architecture.reference.call.kwargs, "pretrained": True}
        text.imports.add("import timm")
        return f"timm.create_model({text.arguments((f'local-dir:{folder.as_posix()}',), given)})"

    def expression_with_file(self, text: SourceText, architecture: Architecture, contents: Contents) -> str | None:
        """`timm.create_model(..., pretrained=True, pretrained_cfg_overlay={"file": "best.pth"})`."""
        from modelcli.live.script.source_text import InexpressibleError, path_in_script

        assert isinstance(architecture.reference, NamedModel)
        named = self.described(architecture.reference, architecture.folder)
        found = loading.overlay_of(architecture.on_meta(0), live_loading.on_meta(contents))
        if found is None:
            return None
        if _is_folder(named) or contents.key not in _KEYS_OF_TIMM:
            raise InexpressibleError("timm adapts the checkpoint, and does not read it by itself")
        overlay, classes = found
        given = {**({} if classes is None else {"num_classes": classes}), **architecture.reference.call.kwargs}
        given |= {"pretrained": True, "pretrained_cfg_overlay": {"file": path_in_script(contents.path), **overlay}}
        text.imports.add("import timm")
        return f"timm.create_model({text.arguments((named.name,), given)})"

    def find_class(self, package: str, name: str) -> object:
        """A class of `timm.layers` or of a module of the models."""
        if not package or not self.provider.is_installed:
            return None
        importlib.import_module("timm")
        return getattr(sys.modules.get(package), name, None)


def image_resizing(model: Any, size: int) -> Resizing:
    """How timm gives a model another image size: by the model's own `set_input_size`.

    Windows keep their size, as with `timm.create_model(NAME, img_size=...)`, where the model has them.
    """
    from timm.models._input import get_model_input_config

    height, width = get_model_input_config(model)["input_size"][-2:]
    windows = getattr(model, "_ref_window_sizes", None)
    call = f"set_input_size(img_size=({size}, {size})" + (f", window_size={windows!r})" if windows else ")")

    def resize(module: Any) -> None:
        given = {"window_size": windows} if windows else {}
        module.set_input_size(img_size=(size, size), **given)

    return Resizing((height, width), resize, lambda _text, place: [f"{place}.{call}"])


def weights_of(name: str) -> tuple[str, ...]:
    """The tags of the pretrained weights of a model, timm's default first."""
    from timm.models import _registry

    names = _registry._model_with_tags.get(name, ())
    return tuple(full.partition(".")[2] or UNTAGGED for full in names if full in _registry._model_has_pretrained)


def _is_folder(model: TimmModel) -> bool:
    return model.name.startswith("local-dir:")


def _paths(named: Any) -> tuple[str, ...]:
    """The paths of modules that a configuration names: one, several, or none."""
    return (named,) if isinstance(named, str) else tuple(named or ())

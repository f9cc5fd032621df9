"""The torch half of the provider `hf`: see `modelcli.providers.huggingface`."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from modelcli.errors import RequestError, UnsafeError
from modelcli.language.expressions import Name
from modelcli.language.references import NamedModel, Reference
from modelcli.live import bounds, modules
from modelcli.live.build import Architecture
from modelcli.live.loading import StateDict
from modelcli.live.meta_models import meta_copy
from modelcli.live.providers.base import FittedStateDict, LiveProvider, ModelFolder, refuse_hole
from modelcli.live.providers.huggingface import configurations, conversion, passes, vetting
from modelcli.providers import configuration
from modelcli.providers.huggingface import hub_model, is_class_name
from modelcli.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modelcli.checkpoints import Contents
    from modelcli.live.inputs import Inputs
    from modelcli.live.providers.huggingface.configurations import Described
    from modelcli.live.resizing import Resizing
    from modelcli.live.script.source_text import SourceText


class LiveHuggingFace(LiveProvider):
    """Builds the model that a configuration describes, with transformers' own classes."""

    def prepare(self) -> None:
        """Import transformers, which takes seconds."""
        self.require_installed()
        importlib.import_module("transformers")
        importlib.import_module("transformers.modeling_utils")

    def architecture(
        self, reference: Reference, *, weights: str | None, folder: Path, trust: bool, remote_code: bool = False
    ) -> Architecture:
        """The model of a folder, of the Hub, or of a class with the values of its configuration.

        Raises RequestError for a folder or class that is none, and for arguments that its configuration does not have.
        """
        assert isinstance(reference, NamedModel)
        refuse_hole(reference)
        self.prepare()
        call, text = reference.call, str(reference)
        if call.args:
            raise RequestError(
                f"{text}: a Hugging Face model takes keyword arguments only", "write hf:ORG/NAME(num_labels=3)"
            )
        values = {
            key: value.dotted
            if key == "auto_class" and isinstance(value, Name)
            else modules.value_of(value, trusted=trust)
            for key, value in call.kwargs.items()
        }
        described = self._described(call.name, values, folder, remote_code=remote_code)
        what = f"the model that the configuration of {call.name} describes"
        build = partial(modules.construct, described.build, [], {}, text)
        return Architecture(
            reference,
            build,
            build,
            self,
            pretrained=True,
            bounds=bounds.as_typed(text) if is_class_name(call.name) else bounds.of_configuration(what),
            folder=folder,
            notes=described.notes,
            details=described,
            is_partial=bool(values),
        )

    def _described(self, name: str, values: Mapping[str, Any], folder: Path, *, remote_code: bool) -> Described:
        """What a name and its arguments describe."""
        if is_class_name(name) and (model_class := configurations.find_class(name)) is not None:
            return configurations.of_class(model_class, values)
        path = self.provider.own_folder(name, folder)
        document_of_folder = None if path is None else configuration.configuration_in(path)
        if document_of_folder is None:
            if is_class_name(name):
                raise RequestError(f"transformers has no class {name}", "hf:ORG/NAME is a model of the Hub")
            if hub_model(name) is not None:  # only what the user names is asked for
                raise RequestError(f"{name} of the Hub has not been downloaded", "name it on the command line")
            raise RequestError(
                f"there is no folder {name} with a {configuration.NAME}",
                "name a folder that save_pretrained wrote",
            )
        if (model := hub_model(name)) is None:
            return configurations.describe(document_of_folder, values, name, trust=remote_code, folder=path)
        try:
            return configurations.describe(document_of_folder, values, name)
        except UnsafeError as error:
            if any(document_of_folder.get(entry) for entry in vetting.REMOTE_CODE):
                fetch = f"hf download {model.repository} --local-dir {model.repository.rpartition('/')[2]}"
                error.hint = f"modelcli downloads no code: {fetch} does, and --trust runs that of a folder"
            raise

    def remote_contents(self, reference: NamedModel, folder: Path) -> Contents | None:
        """The weights of a model of the Hub, by the headers of its files."""
        from modelcli.live.providers.huggingface import remote_weights

        model = hub_model(reference.call.name)
        return None if model is None else remote_weights.contents_of(model)

    def fit_state_dict(self, architecture: Architecture, module: nn.Module, state: StateDict) -> FittedStateDict:
        """Give the tensors the keys of the model, as `from_pretrained` does."""
        tensors = conversion.to_module_keys(module, state.tensors)
        notes = []
        if architecture.is_partial:  # other arguments than those that the weights were saved with
            own = module.state_dict()
            other = [key for key, value in tensors.items() if key in own and own[key].shape != value.shape]
            for key in other:
                del tensors[key]
            if other:
                notes.append(f"modelcli does not load {listed(other, 4)}, which these arguments give other shapes")
        own = module.state_dict()
        may_be_unexpected = configurations.pattern_of(module, "_keys_to_ignore_on_load_unexpected")
        for key in [key for key in tensors if key not in own and may_be_unexpected(key)]:
            del tensors[key]
        may_be_missing = configurations.pattern_of(module, "_keys_to_ignore_on_load_missing")
        optional = frozenset(key for key in own if key not in tensors and may_be_missing(key))
        return FittedStateDict(StateDict(tensors, state.metadata, state.extras), tuple(notes), optional)

    def model_folder(self, architecture: Architecture, module: nn.Module, folder: Path | None) -> ModelFolder | None:
        """The folder that `from_pretrained` takes, where the model still is one of transformers."""
        from modelcli.live.providers.huggingface import saving

        return saving.model_folder(module, self._described_by(architecture), folder)

    def recorded_reference(self, architecture: Architecture) -> str:
        """The class with the values of its configuration, so that no folder has to be there."""
        described = self._described_by(architecture)
        if not described.is_of_transformers:
            return str(architecture.reference)
        return f"{self.provider.prefix}:{described.by_class()}"

    def landmarks(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
        """The layers as wide as the number of labels, and the embedding of the tokens or the first convolution."""
        if not _is_of_transformers(module):
            return {}
        from modelcli.live.providers.huggingface import landmarks

        return landmarks.of(module)

    def outputs_beyond_classes(self, module: nn.Module) -> int:
        """One in the classifiers of DETR and its kind: what is no object."""
        if not _is_of_transformers(module):
            return 0
        from modelcli.live.providers.huggingface import landmarks

        return landmarks.outputs_beyond_labels(module)

    def resizing(self, module: nn.Module, what: str, size: int) -> Resizing | None:
        """The tokens by `resize_token_embeddings`, images by another value of the configuration."""
        if not _is_of_transformers(module):
            return None
        from modelcli.live.providers.huggingface import resizing

        made: Any = module
        return resizing.resizing(made, what, size)

    def describe_edits(self, architecture: Architecture, module: nn.Module) -> None:
        """Give the model the configuration that its edits make: training and `save_pretrained` go by it."""
        from modelcli.live.providers.huggingface import edited_configuration

        if _is_of_transformers(module):
            edited_configuration.put_into(module, self._described_by(architecture).configuration())

    def script_of_edits(self, text: SourceText, architecture: Architecture, module: nn.Module) -> list[str]:
        """`model.config.num_hidden_layers = 2`, and what else `describe_edits` changes."""
        from modelcli.live.providers.huggingface import edited_configuration

        if not _is_of_transformers(module):
            return []
        made = cast("PreTrainedModel", module)
        return edited_configuration.script_lines(text, made, self._described_by(architecture).configuration())

    def after_loading(self, architecture: Architecture, module: nn.Module) -> None:
        """Keep in float32 what transformers keeps so, whatever the dtype of the model."""
        from modelcli.live.providers.huggingface import kept_dtypes

        if _is_of_transformers(module) and self._described_by(architecture).is_of_transformers:
            kept_dtypes.give(cast("PreTrainedModel", module))

    def dtypes_of_unsaved(self, architecture: Architecture, module: nn.Module) -> Mapping[str, str]:
        """Those that the class gives them: rotary frequencies are in float32 in a model of bfloat16."""
        from modelcli.live.providers.huggingface import kept_dtypes

        described = self._described_by(architecture)
        if not (_is_of_transformers(module) and described.is_of_transformers):
            return {}
        return kept_dtypes.of_unsaved(cast("PreTrainedModel", module), described.configuration())

    def inputs(self, architecture: Architecture, module: nn.Module) -> Inputs | None:
        """Dummy inputs by the arguments of `forward` and the configuration."""
        from modelcli.live.providers.huggingface import inputs

        def described() -> nn.Module:
            copied = meta_copy(module)
            self.describe_edits(architecture, copied)
            return copied

        return inputs.inputs_of(module, described)

    def further_inputs(self, module: nn.Module) -> Collection[str] | None:
        """What transformers declares for `**kwargs`, and what the parts of the model take that get them."""
        from modelcli.live.providers.huggingface import inputs

        return inputs.further_inputs_of(module) if _is_of_transformers(module) else None

    def expression(self, text: SourceText, architecture: Architecture, folder: Path) -> str:
        """The class with the configuration of the folder or of a model of the Hub, or with its values."""
        from modelcli.live.providers.huggingface import script

        assert isinstance(architecture.reference, NamedModel)
        name = architecture.reference.call.name
        place = hub_model(name) or self.provider.own_folder(name, architecture.folder)
        return script.from_configuration(text, self._described_by(architecture), place)

    def expression_with_weights(
        self, text: SourceText, architecture: Architecture, module: nn.Module, folder: Path
    ) -> str | None:
        """`BertModel.from_pretrained("./runs/bert")`, or with the name on the Hub and the commit."""
        from modelcli.live.providers.huggingface import script

        assert isinstance(architecture.reference, NamedModel)
        place = hub_model(architecture.reference.call.name) or folder
        return script.with_weights(text, self._described_by(architecture), module, place)

    def before_pass(self, module: nn.Module) -> None:
        """Choose the attention and the experts that need no values: the faster ones look into their masks."""
        if "transformers" in sys.modules:
            passes.prepare(module)

    def during_pass(self, module: nn.Module, device: str) -> AbstractContextManager[None]:
        """Without values there is nothing in the tensors to check; and nothing is logged."""
        if "transformers.modeling_utils" not in sys.modules or not passes.has_model(module):
            return contextlib.nullcontext()
        return passes.surrounded(device)

    def _described_by(self, architecture: Architecture) -> Described:
        described: Described = architecture.details
        return described


def _is_of_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, which is not imported for this."""
    home = sys.modules.get("transformers.modeling_utils")
    return home is not None and isinstance(module, home.PreTrainedModel)

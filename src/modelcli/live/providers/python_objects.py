"""Objects of the user's own Python as models: `nets.py:Net(3,2)`, `package.module:build`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from modelcli import providers
from modelcli.errors import RequestError, UnsafeError
from modelcli.language.expressions import Call
from modelcli.language.references import NamedModel, PythonObject, Reference
from modelcli.live import modules, user_code
from modelcli.live.build import Architecture
from modelcli.live.providers.base import LiveProvider, refuse_hole
from modelcli.live.providers.torch_nn import no_weights

if TYPE_CHECKING:
    from modelcli.live.script.source_text import SourceText

#: What is loaded in a script by the time that files of the user's are: a file called so is not what an import gives.
_LOADED = frozenset({"safetensors", "numpy"})


class LivePythonObjects(LiveProvider):
    """Classes, functions that return a module, and instances."""

    def takes(self, reference: Reference) -> bool:
        """Whether it names Python."""
        return isinstance(reference, PythonObject)

    def architecture(
        self, reference: Reference, *, weights: str | None, folder: Path, trust: bool, remote_code: bool = False
    ) -> Architecture:
        """The object that is named, found by running its file. Raises UnsafeError without `trust`."""
        assert isinstance(reference, PythonObject)
        if not trust:
            raise UnsafeError(
                f"the checkpoint names {reference.shown_from(Path())}, and following it would run that code",
                "--trust (trust=True in Python) follows it; or pass --arch with the whole architecture, edits "
                "included; --bare-keys works on the keys alone",
            )
        if weights is not None:
            raise no_weights(weights)
        value = user_code.find(reference, folder)
        text = str(reference)
        if isinstance(value, nn.Module) and reference.call is None:
            return Architecture(reference, lambda: value, lambda: value, self, instance=value)
        if not callable(value) or (reference.call is None and isinstance(value, nn.Module)):
            what = (
                f"the Python module {value.__name__}"
                if isinstance(value, ModuleType)
                else f"of type {type(value).__name__}"
            )
            raise RequestError(f"{text} is {what}, not an nn.Module, its class, or a function that returns one")
        call = reference.call or Call(reference.name)
        refuse_hole(NamedModel(call))
        args = [modules.value_of(item, trusted=True) for item in call.args]
        kwargs = {key: modules.value_of(item, trusted=True) for key, item in call.kwargs.items()}
        modules.check_arguments(value, args, kwargs, text)

        home = folder.resolve()  # the current folder may be another when it is built
        imported_from = reference.file.parent.resolve() if reference.file else home

        def plain() -> nn.Module:
            with user_code.running_user_code(text, imported_from), contextlib.chdir(home):
                return modules.construct(value, args, kwargs, text)

        return Architecture(reference, plain, plain, self, folder=home)

    def expression(self, text: SourceText, architecture: Architecture, folder: Path) -> str:
        """The object, imported or run from its file, and called as the reference calls it."""
        reference = architecture.reference
        assert isinstance(reference, PythonObject)
        found = _imported(text, reference, folder)
        if architecture.instance is not None:
            return found
        call = reference.call
        return f"{found}({'' if call is None else text.arguments(call.args, call.kwargs)})"


def _imported(text: SourceText, reference: PythonObject, folder: Path) -> str:
    """A class, function or instance of the user's own in a script."""
    from modelcli.live.script.source_text import is_name, path_in_script, quoted

    first = reference.name.partition(".")[0]
    if reference.file is None:
        text.folders.setdefault(path_in_script(folder))
        found = text.own_object(reference.source, first)
    else:
        text.folders.setdefault(path_in_script(reference.file.parent))
        stem = reference.file.stem
        if is_name(stem) and stem not in sys.stdlib_module_names | _LOADED and stem not in providers.packages():
            found = text.own_object(stem, first)
        else:
            found = f"{text.own_file(path_in_script(reference.file), stem)}[{quoted(first)}]"
    return found + reference.name.removeprefix(first)

"""torchvision: its builders, which need no prefix, and the module classes of its `ops` and of its models.

Names are read from its source, which takes 30 ms; importing torchvision takes seconds. They are used for completion and
messages: torchvision itself decides which names are valid.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from modelcli import installed
from modelcli.providers.base import Provider

#: The packages of its models, and of the modules in them.
MODELS = "torchvision.models"
OPS = "torchvision.ops"


class Torchvision(Provider):
    """`alexnet`, `resnet18(num_classes=10)`; `torchvision.ops.MLP(4,[4,4])` inside an expression."""

    name = "torchvision"
    live = "modelcli.live.providers.torchvision:LiveTorchvision"
    has_names = True
    title = "a torchvision builder (alexnet)"
    packages = ("torch", "torchvision")
    classes_from = OPS
    script_names = frozenset({"models", "ops"})

    def names(self) -> list[str]:
        """Return the names of `torchvision.models.list_models()`: the functions that its sources register."""
        return list(_registered())

    def weights_names(self) -> list[str]:
        """Return the members of its enums of weights."""
        members = re.compile(r"^    ([A-Z][A-Z0-9_]+) = (?:Weights\(|[A-Z])", re.MULTILINE)
        return sorted({name for text in _model_sources() for name in members.findall(text)})

    def class_names(self) -> list[str]:
        """Return the classes that `torchvision.ops` exports; its functions begin with a small letter."""
        return re.findall(r'"([A-Z]\w*)"', installed.source("torchvision", "ops/__init__.py").partition("__all__")[2])

    def bare_words(self) -> list[str]:
        """Return only the builders: a file takes precedence over a class of `ops` with its name."""
        return self.names()

    def owns(self, package: str) -> bool:
        """Whether a package is `torchvision.ops`, `torchvision.models` or a module of the latter."""
        return package in (OPS, MODELS) or package.startswith(f"{MODELS}.")


PROVIDER = Torchvision()


@functools.cache
def _registered() -> tuple[str, ...]:
    registered = re.compile(r"^@register_model\((?:name=\"(\w+)\")?\)$.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)
    return tuple(sorted(name or function for text in _model_sources() for name, function in registered.findall(text)))


def _model_sources() -> Iterator[str]:
    folder = installed.folder("torchvision")
    for path in sorted((folder / "models").rglob("*.py")) if folder is not None else ():
        yield path.read_text(encoding="utf-8")

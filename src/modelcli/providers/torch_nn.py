"""`torch.nn`: module expressions as models, `Sequential(Linear(2,3),ReLU())`. Other providers add more classes."""

from __future__ import annotations

import re

from modelcli import installed
from modelcli.providers.base import Provider

#: Packages with functions that take a module and return it, changed: `weight_norm(Linear(2,3))`.
WRAPPERS = ("torch.nn.utils.parametrizations",)


class TorchNN(Provider):
    """Its models are calls of its classes, so there is no list of them."""

    name = "torch.nn"
    live = "modelcli.live.providers.torch_nn:LiveTorchNN"
    title = "a module expression ('Linear(2,3)')"
    packages = ("torch",)
    classes_from = "torch.nn"
    script_names = frozenset({"nn"})

    def class_names(self) -> list[str]:
        """Return the classes that `torch.nn` exports, read from its source."""
        text = installed.source("torch", "nn/modules/__init__.py")
        return re.findall(r'^    "(\w+)",$', text.partition("__all__")[2], re.MULTILINE)

    def bare_words(self) -> list[str]:
        """Return the names of classes: `ReLU` alone is a model."""
        return self.class_names()

    def owns(self, package: str) -> bool:
        """Whether a package is `torch.nn`, by any of its names, or one of `WRAPPERS`.

        An empty name, as in `Linear(2,3)`, is one of the names of `torch.nn`.
        """
        return package in ("", "torch", "nn", "torch.nn") or package in WRAPPERS


PROVIDER = TorchNN()


def init_names() -> list[str]:
    """Return the functions of `torch.nn.init` that fill a tensor, without their underscore, read from its source."""
    return re.findall(r"^def ([a-z]\w*)_\(", installed.source("torch", "nn/init.py"), re.MULTILINE)

"""`torch.nn`: module expressions as models, `Sequential(Linear(2,3),ReLU())`. Other providers bring more classes."""

from __future__ import annotations

import re

from modelcli import installed
from modelcli.providers.base import Provider


class TorchNN(Provider):
    """Its models are calls of its classes. There is no list of them."""

    name = "torch.nn"
    live = "modelcli.live.providers.torch_nn:LiveTorchNN"
    title = "a module expression ('Linear(2,3)')"
    packages = ("torch",)
    classes_from = "torch.nn"
    script_names = frozenset({"nn"})

    def class_names(self) -> list[str]:
        """The classes that `torch.nn` lists, read off its source."""
        text = installed.source("torch", "nn/modules/__init__.py")
        return re.findall(r'^    "(\w+)",$', text.partition("__all__")[2], re.MULTILINE)

    def bare_words(self) -> list[str]:
        """A class by itself: `ReLU`."""
        return self.class_names()

    def owns(self, package: str) -> bool:
        """Whether it is `torch.nn`, by any of its names: none at all, in `Linear(2,3)`, is one."""
        return package in ("", "torch", "nn", "torch.nn")


PROVIDER = TorchNN()


def init_names() -> list[str]:
    """The functions of `torch.nn.init` that fill a tensor, without their underscore, read off its source."""
    return re.findall(r"^def ([a-z]\w*)_\(", installed.source("torch", "nn/init.py"), re.MULTILINE)

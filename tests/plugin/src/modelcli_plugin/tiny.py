"""What modelcli needs to know of the library `tiny_models` before it is imported."""

from __future__ import annotations

from modelcli.providers.base import Provider


class Tiny(Provider):
    """`tiny:mlp`, `tiny:conv(classes=3)`."""

    name = "tiny"  # what messages call it
    prefix = "tiny"  # tiny:mlp
    live = "modelcli_plugin.tiny_live:LiveTiny"  # the torch half, imported when a model is built
    has_names = True  # `list` shows its models, `identify` compares with them
    packages = ("modelcli-plugin",)  # their versions are part of the key of all that is cached
    script_names = frozenset({"tiny_models"})  # what its lines in a script import: no file of a user is called so there

    def names(self) -> list[str]:
        """Two."""
        return ["mlp", "conv"]

    def weights_names(self) -> list[str]:
        """One, which both have."""
        return ["COUNTED"]

    def owns(self, package: str) -> bool:
        """The library itself."""
        return package == "modelcli_plugin.tiny_models"

    def is_known_code(self, name: str) -> bool:
        """Both are built by the library alone."""
        return name in self.names()

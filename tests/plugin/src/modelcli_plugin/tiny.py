"""What modelcli needs to know of the library `tiny_models` before it is imported."""

from __future__ import annotations

from modelcli.providers.base import Provider


class Tiny(Provider):
    """`tiny:mlp`, `tiny:conv(classes=3)`."""

    name = "tiny"
    live = "modelcli_plugin.tiny_live:LiveTiny"
    prefix = "tiny"
    has_names = True
    packages = ("modelcli-plugin",)
    script_names = frozenset({"tiny_models"})

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

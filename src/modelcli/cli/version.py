"""What `--version` shows: the versions that are installed, without importing any of them."""

from modelcli import __version__, installed, providers


def text() -> str:
    """`modelcli 0.1.0 (torch 2.15.0, ...)`: those of the built-in providers' libraries."""
    versions = ((package, installed.version(package)) for package in providers.packages())
    found = ", ".join(f"{package} {version}" if version else f"no {package}" for package, version in versions)
    return f"modelcli {__version__} ({found})"

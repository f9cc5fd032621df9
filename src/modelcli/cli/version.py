"""What `--version` shows: the versions that are installed, without importing any of them."""

from importlib import metadata

from modelcli import __version__


def text() -> str:
    """`modelcli 0.1.0 (torch 2.15.0, torchvision 0.29.2)`."""
    found = []
    for package in ("torch", "torchvision"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return f"modelcli {__version__} ({', '.join(found)})"

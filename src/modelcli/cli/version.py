"""What `--version` shows: the versions that are installed, without importing any of them."""

from modelcli import __version__, installed, providers


def text() -> str:
    """`modelcli 0.1.0 (torch 2.15.0, ...)`: those of the built-in providers' libraries, of extras where installed."""
    needed = [(package, installed.version(package)) for package in providers.packages()]
    extra = [(package, installed.version(package)) for package in providers.packages_of_extras()]
    found = [f"{package} {version}" if version else f"no {package}" for package, version in needed]
    found += [f"{package} {version}" for package, version in extra if version]
    return f"modelcli {__version__} ({', '.join(found)})"

"""The commands, mounted: what each does stands in the file of its group."""

from typing import Annotated

import typer

from modelcli.cli import cache, compare, files, inspect, operate

app = typer.Typer(
    name="modelcli",
    help="Inspect PyTorch models and operate on them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A model is a torchvision builder (alexnet), a module expression ('Linear(2,3)'), a class of your own "
    "(nets.py:Net) or a checkpoint (best.pth).",
)


def _version(wanted: bool) -> None:
    if wanted:
        from modelcli.cli.version import text

        typer.echo(text())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions, and end.")
    ] = False,
) -> None:
    pass


inspect.mount(app)
operate.mount(app)
files.mount(app)
compare.mount(app)
cache.mount(app)

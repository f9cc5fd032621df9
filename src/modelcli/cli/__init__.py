"""The command line: parse, call one function of `session`, hand the value to the output."""

from modelcli.cli.main import main, run

__all__ = ["main", "run"]

"""`python -m modelcli`."""

from modelcli.cli import run

run()

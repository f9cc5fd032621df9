"""Objects of a user's Python code: `nets.py:Net(3,2)`, `package.module:build(depth=3)`.

Building one runs code outside the known libraries, so a record in a file may only name one with `--trust`.
"""

from __future__ import annotations

from modelcli.providers.base import Provider


class PythonObjects(Provider):
    """Classes, functions and instances. Finding them runs their file."""

    name = "Python"
    live = "modelcli.live.providers.python_objects:LivePythonObjects"
    title = "a class of your own (nets.py:Net)"


PROVIDER = PythonObjects()

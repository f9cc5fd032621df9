"""Objects of the user's own Python: `nets.py:Net(3,2)`, `package.module:build(depth=3)`.

Every one of them runs code that no installed library vouches for, so that a record in a file never is followed to one
without `--trust`.
"""

from __future__ import annotations

from modelcli.providers.base import Provider


class PythonObjects(Provider):
    """Classes, functions and instances. Which there are is found out by running their file."""

    name = "Python"
    live = "modelcli.live.providers.python_objects:LivePythonObjects"
    title = "a class of your own (nets.py:Net)"


PROVIDER = PythonObjects()

"""Load the user's own code: looking up `nets.py:Net` or `package.module:build` runs its file."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from modelcli.errors import ModelcliError, RequestError, closest
from modelcli.language.references import PythonObject
from modelcli.wording import listed


def find(reference: PythonObject, folder: Path) -> Any:
    """Return the class, function or instance that a reference names. Raises RequestError with the closest names."""
    module = import_file(reference.file) if reference.file else import_module(reference.source, folder)
    value: Any = module
    for step in reference.name.split("."):
        if not hasattr(value, step):
            names = [name for name in vars(value) if not name.startswith("_")] if hasattr(value, "__dict__") else []
            own = [name for name in names if getattr(getattr(value, name), "__module__", "") == module.__name__]
            near = closest(step, names) or own
            raise RequestError(f"no {step!r} in {reference.source}", f"there is: {listed(near, 8)}" if near else None)
        value = getattr(value, step)
    return value


def import_file(path: Path) -> ModuleType:
    """Run a Python file as a module; it can import the modules beside it. Each file is run once."""
    path = path.resolve()
    for known, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == str(path) and not known.startswith("_modelcli_"):
            return module  # the program that calls us has imported it already: its classes are meant
    name = f"_modelcli_{path.stem}_{abs(hash(path)):x}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise RequestError(f"{path} is a device, a pipe or a folder, not a Python file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RequestError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with running_user_code(str(path), path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_module(name: str, folder: Path = Path()) -> ModuleType:
    """Import a module by its name; the folder is importable."""
    with running_user_code(name, Path(), folder):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise
            raise RequestError(f"no module named {error.name}", _file_of(name, Path(), folder)) from None


def _file_of(name: str, *folders: Path) -> str:
    """Return the hint for a module without the wanted name: it may be a file that an installed package hides."""
    path = Path(*name.split(".")).with_suffix(".py")
    if found := next((folder / path for folder in folders if (folder / path).is_file()), None):
        return f"an installed package has that name; the file is named by its path: {found}:..."
    return "a file is written with its suffix: nets.py:Net(3,2)"


@contextlib.contextmanager
def running_user_code(what: str, *folders: Path) -> Iterator[None]:
    """Run the user's code in the block, with the modules in the folders importable.

    The folders come last: what is installed, and what an installed package imports, is never taken from a file that
    happens to lie in the current folder. What the code prints goes to standard error, what it raises becomes a
    RequestError.
    """
    entries = list(dict.fromkeys(str(folder.resolve()) for folder in folders))
    before = list(sys.path)
    sys.path[:] = [*(entry for entry in before if entry and os.path.realpath(entry) not in entries), *entries]
    during = list(sys.path)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (ModelcliError, MemoryError):
        raise
    except SystemExit as error:
        raise RequestError(f"{what} ended the program: exit code {error.code}") from error
    except ModuleNotFoundError as error:
        raise _missing(what, error) from error
    except Exception as error:
        raise RequestError(f"{what} raised {type(error).__name__}: {error}", _place(error)) from error
    finally:
        own = [entry for entry in sys.path if entry not in during and entry not in before]  # the code's own entries
        sys.path[:] = [*own, *before]


def _missing(what: str, error: ModuleNotFoundError) -> RequestError:
    """Return the error for a failed import in the user's code, which names the interpreter that lacks the module."""
    name, place = error.name or str(error), _place(error)
    package, _, inside = name.partition(".")
    at = f" ({place})" if place else ""
    if inside and package in sys.modules:
        return RequestError(f"{what} imports {name}, and the {package} of {sys.executable} has no such module{at}")
    return RequestError(
        f"{what} imports {package}, which is not installed in {sys.executable}, nor a file beside it{at}",
        f"{sys.executable} -m pip install {package} installs it there, if it is a package",
    )


def _place(error: Exception) -> str | None:
    """Return the file and line of the user's code that raised an error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/modelcli/" not in f.filename and not f.filename.startswith("<frozen")]
    return f"at {own[-1].filename}:{own[-1].lineno}" if own else None

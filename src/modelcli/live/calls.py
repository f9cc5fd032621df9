"""Observe which modules run in a forward pass, under which path, and how each call ends.

Hooks observe most calls. They miss a call of `module.forward(...)`, of a class with its own `__call__`, and of a
scripted module. To observe these, modelcli sets `forward` on the instance and `__call__` on the class during the pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from modelcli.live.describe import walk

#: The levels at which a call is observed, from the outside in: the class's own `__call__`, a hook, `forward`.
_CALL, _HOOK, _FORWARD = range(3)


@dataclass
class Call:
    """A call of a module that has begun.

    Attributes:
        module: the module.
        path: the path under which it was called.
        origin: the level at which the call was observed first.
        level: the innermost level at which it was observed.
        inside: whether it has called another module.
        started: a value that the listener may use.
    """

    module: nn.Module
    path: str
    origin: int
    level: int
    inside: bool = False
    started: int = 0


class Listener(Protocol):
    """An object whose methods are called when a module call begins and ends. `begins` may raise to end the pass."""

    def begins(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None: ...

    def ends(self, call: Call, output: Any) -> None: ...


class Calls:
    """Reports the calls of a model's modules to a listener. A shared module has the path that its caller uses.

    Attributes:
        listener: the object that gets the reports.
        paths: the paths of each module, by id.
        modules: the modules, by id.
        ran: the ids of the modules that were called.
        failed_in: the path of the innermost module that raised; None if none did.
    """

    def __init__(self, model: nn.Module, listener: Listener) -> None:
        self.listener = listener
        self.paths: dict[int, list[str]] = {}
        self.modules: dict[int, nn.Module] = {}
        for path, child in walk(model):
            self.paths.setdefault(id(child), []).append(path)
            self.modules[id(child)] = child
        self.ran: set[int] = set()
        self.failed_in: str | None = None
        self._error: BaseException | None = None
        self._open: list[Call] = []

    @property
    def innermost(self) -> str | None:
        """The path of the innermost module that is running; None if none is."""
        return self._open[-1].path if self._open else None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Report the calls that happen in the block."""
        with contextlib.ExitStack() as stack:
            for child in self.modules.values():
                if isinstance(child, torch.jit.ScriptModule):
                    continue  # it accepts neither these hooks nor another forward
                before = nn.Module.register_forward_pre_hook(child, self._before, with_kwargs=True)
                stack.callback(before.remove)
                after = nn.Module.register_forward_hook(child, self._after, with_kwargs=True)
                stack.callback(after.remove)
                stack.enter_context(self._own_forward(child))
            for kind in {type(child) for child in self.modules.values()}:
                if kind.__call__ is not nn.Module.__call__ or issubclass(kind, torch.jit.ScriptModule):
                    stack.enter_context(self._own_call(kind))
            yield

    def _before(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begin(child, _HOOK, args, kwargs)

    def _after(self, child: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        while self._open and self._open[-1].module is not child:
            self._open.pop()  # a user's hook raised, and a caller caught the exception
        if self._open and self._open[-1].origin == _HOOK:
            self._end(self._open[-1], output)

    @contextlib.contextmanager
    def _own_forward(self, child: nn.Module) -> Iterator[None]:
        own = vars(child)
        had = "forward" in own
        forward = child.forward

        @functools.wraps(forward)
        def seen(*args: Any, **kwargs: Any) -> Any:
            return self._through(child, _FORWARD, forward, args, kwargs)

        own["forward"] = seen
        try:
            yield
        finally:
            if had:
                own["forward"] = forward
            else:
                own.pop("forward", None)

    @contextlib.contextmanager
    def _own_call(self, kind: type[nn.Module]) -> Iterator[None]:
        had = "__call__" in vars(kind)
        calling: Callable[..., Any] = kind.__call__
        calls = self

        @functools.wraps(calling)
        def seen(child: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(child) not in calls.paths:
                return calling(child, *args, **kwargs)
            return calls._through(child, _CALL, functools.partial(calling, child), args, kwargs)

        kind.__call__ = seen  # type: ignore[method-assign]
        try:
            yield
        finally:
            if had:
                kind.__call__ = calling  # type: ignore[method-assign]
            else:
                del kind.__call__

    def _through(
        self, child: nn.Module, level: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a function and report the call, unless an outer level has already reported it."""
        call = self._begin(child, level, args, kwargs)
        depth, path = len(self._open), self._open[-1].path
        try:
            output = function(*args, **kwargs)
        except BaseException as error:
            self._note(error, path)
            del self._open[depth - 1 :]
            raise
        if call is not None:
            del self._open[depth:]
            self._end(call, output)
        return output

    def _begin(self, child: nn.Module, level: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """Report that a call begins. Returns None if an outer level has already reported it."""
        above = self._open[-1] if self._open else None
        if above is not None and above.module is child and above.level < level:
            above.level = level
            return None
        if above is not None:
            above.inside = True
        path = _path_of_call(self.paths[id(child)], child, above)
        call = Call(child, path, level, level)
        self._open.append(call)
        self.ran.add(id(child))
        try:
            self.listener.begins(call, args, kwargs)
        except BaseException as error:
            self._note(error, path)
            self._open.pop()
            raise
        return call

    def _end(self, call: Call, output: Any) -> None:
        self._open.pop()
        self.listener.ends(call, output)

    def _note(self, error: BaseException, path: str) -> None:
        """Record the path that an exception came from. The first report of it is from the innermost module."""
        if self._error is not error:
            self._error, self.failed_in = error, path


def _path_of_call(paths: Sequence[str], child: nn.Module, above: Call | None) -> str:
    """Return the path of a module called inside the call `above`: the closest path below it, else the first path."""
    caller = "" if above is None else above.path
    if above is not None:
        for name, own in above.module._modules.items():
            if own is child:
                return f"{caller}.{name}" if caller else name
    below = [path for path in paths if not caller or path.startswith(f"{caller}.")]
    return min(below or paths[:1], key=lambda path: path.count("."))

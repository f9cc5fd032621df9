"""Which modules run in a forward pass, under which path, and how each call ends.

Hooks see most calls. They do not see one of `module.forward(...)`, of a class with a `__call__` of its own, or of a
scripted module: these are seen by a `forward` set on the instance, and by a `__call__` set on the class, for as long as
the pass takes.
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

#: How far inside a call is seen: by the class's own `__call__`, by a hook, by `forward` itself.
_CALL, _HOOK, _FORWARD = range(3)


@dataclass
class Call:
    """A call of a module that has begun.

    `origin` is the level at which it was seen first, `level` the furthest in. `inside` says whether another module was
    called since. `started` is for the listener.
    """

    module: nn.Module
    path: str
    origin: int
    level: int
    inside: bool = False
    started: int = 0


class Listener(Protocol):
    """What hears of each call. `begins` may raise, which ends the pass there."""

    def begins(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None: ...

    def ends(self, call: Call, output: Any) -> None: ...


class Calls:
    """The calls of a model's modules, told to a listener as they begin and end.

    A shared module has the path that its caller knows it by. `failed_in` is the path of the innermost module that an
    exception came out of, once one did; `ran` are the modules that were called, by id; `scripted` those of them whose
    insides nobody sees.
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

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, calls are seen."""
        with contextlib.ExitStack() as stack:
            for child in self.modules.values():
                if isinstance(child, torch.jit.ScriptModule):
                    continue  # takes neither hooks of this kind nor another forward
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
            self._open.pop()  # a hook of the user's raised, and a caller caught it
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
        """Call a function, and tell of the call, unless it was told of further out."""
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
        """Tell that a call begins; None where it is the one that was seen further out."""
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
        """Keep where an exception came from: the first that tells of it is the innermost module."""
        if self._error is not error:
            self._error, self.failed_in = error, path


def _path_of_call(paths: Sequence[str], child: nn.Module, above: Call | None) -> str:
    """Which of a module's paths a call inside the call `above` means: the nearest one below it, else the first."""
    caller = "" if above is None else above.path
    if above is not None:
        for name, own in above.module._modules.items():
            if own is child:
                return f"{caller}.{name}" if caller else name
    below = [path for path in paths if not caller or path.startswith(f"{caller}.")]
    return min(below or paths[:1], key=lambda path: path.count("."))

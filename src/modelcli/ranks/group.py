"""What commands know of the ranks that carry them out together. `connected` has the group of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from modelcli.errors import ModelcliError


class GroupEndedError(BaseException):
    """Another rank has died, failed or hung, so the command ends. (No code that handles errors may go on after it.)"""

    def __init__(self, error: ModelcliError) -> None:
        super().__init__(error.message)
        self.error = error


class RestingError(BaseException):
    """This rank has nothing more to do: rank 0 carries out the rest of the command."""


class Group(Protocol):
    """The ranks that carry out a command together.

    Attributes:
        rank: the number of this one, from 0.
        size: how many there are.
        local_size: how many of them are on this machine.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def local_size(self) -> int: ...

    def exchange(self, what: str, data: bytes) -> list[bytes]:
        """Give all ranks the data of all ranks, in their order. `what` is the same on all ranks."""
        ...

    def broadcast(self, what: str, data: bytes = b"") -> bytes:
        """Return the data of rank 0 on all ranks."""
        ...

    def moved(self, done: int, total: int) -> int:
        """Report the bytes that this rank has done, and return those of all ranks as far as rank 0 knows them.

        Until all bytes are done, or the ranks exchange data, a rank that does not get on counts as hung.

        Raises GroupEndedError on rank 0 if another rank has failed.
        """
        ...

    def rest_unless(self, condition: bool) -> None:
        """Raise RestingError on all ranks but 0 unless there is work for all."""
        ...

    def stop_others(self) -> None:
        """Stop the other ranks at once, because this one, rank 0, is about to undo their work."""
        ...

    def require_same(self, digest: bytes, what: str) -> None:
        """Compare what the ranks share out. Raises GroupEndedError if a rank has another `what`."""
        ...

    def of_rank(self, rank: int, error: ModelcliError) -> ModelcliError:
        """Return the error of a rank, with the name of another rank than 0 in its message."""
        ...

    @property
    def failure(self) -> ModelcliError | None:
        """The error of another rank, once rank 0 knows of one."""
        ...

    def fail(self, error: ModelcliError) -> None:
        """Tell rank 0 why this rank has failed, and wait until the command has ended."""
        ...

    def if_left_alone(self, undo: Callable[[], None]) -> None:
        """Let rank 1 call `undo` if rank 0 dies from now on."""
        ...


class Alone:
    """The group of a process that works by itself."""

    rank, size, local_size = 0, 1, 1

    def exchange(self, what: str, data: bytes) -> list[bytes]:
        return [data]

    def broadcast(self, what: str, data: bytes = b"") -> bytes:
        return data

    def moved(self, done: int, total: int) -> int:
        return done

    def rest_unless(self, condition: bool) -> None:
        """Do nothing: rank 0 does all the work."""

    def stop_others(self) -> None:
        """Do nothing: there are no others."""

    def require_same(self, digest: bytes, what: str) -> None:
        """Do nothing: there is no other plan."""

    def of_rank(self, rank: int, error: ModelcliError) -> ModelcliError:
        return error

    failure: ModelcliError | None = None

    def fail(self, error: ModelcliError) -> None:
        """Do nothing: this is rank 0."""

    def if_left_alone(self, undo: Callable[[], None]) -> None:
        """Do nothing: there is no other rank."""


ALONE: Group = Alone()

"""Which era's function a call was meant for, and what that takes: the beginning of every error of the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from nbhd.errors import ArgumentError, NbhdError
from nbhd.functional import AXES

F = TypeVar("F", bound=Callable[..., Any])


class Unsupported(NbhdError, NotImplementedError):
    """NATTEN raises ``NotImplementedError`` here, and callers catch it."""


@dataclass(frozen=True)
class Signature:
    """A function of one era: ``name`` and what it ``takes``, in a phrase."""

    era: str
    name: str
    takes: str

    def error(self, problem: str) -> ArgumentError:
        """The error for a call that does not fit."""
        return ArgumentError(f"{self.name} of NATTEN {self.era} takes {self.takes}. {problem}")


def heads_first(axes: int) -> str:
    """``[batch, heads, X, ..., dim]``, the layout of unfused functions."""
    return f"[batch, heads, {', '.join(AXES[:axes])}, dim]"


def heads_last(axes: int) -> str:
    """``[batch, X, ..., heads, dim]``, the layout of fused functions."""
    return f"[batch, {', '.join(AXES[:axes])}, heads, dim]"


def named(function: F, name: str, module: str, doc: str) -> F:
    """A function made by a factory, under the name and in the module where callers find it."""
    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    function.__doc__ = doc
    return function

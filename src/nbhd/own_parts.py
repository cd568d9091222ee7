"""Notice when a module is not made of nothing but the parts it was written with any more.

A module that computes with its parts' parameters instead of calling them has to know that calling them would do the
same: that they are of the classes it knows, and that nobody has put hooks, adapters or functions of his own there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from torch import nn

from nbhd.linear import is_plain

T = TypeVar("T")


class OwnParts(Generic[T]):
    """What to compute a module with while its parts are its own. No part of copies and pickles of the module.

    Args:
        kinds: for each name of a part, the classes that it may have; all parts have to be there.
        make: what to compute the module with, made of one that has its own parts.
        also: what else has to be true of the module, asked at each call.
    """

    def __init__(
        self, kinds: Mapping[str, tuple[type[nn.Module], ...]], make: Callable[[Any], T],
        also: Callable[[Any], bool],
    ) -> None:  # fmt: skip
        self._given = kinds, make, also
        self._seen: _Seen[T] | None = None  # threads replace it as a whole

    def found(self, module: nn.Module) -> T | None:
        """What to compute ``module`` with, if it has its own parts and nobody's hooks.

        They are looked at closely the first time, and again when they are others. The module's own hooks do not matter:
        they are run by whoever calls it.
        """
        kinds, make, also = self._given
        if nn.modules.module._has_any_global_hook():
            return None
        seen = self._seen
        if seen is None or not seen.is_of(module):
            self._seen = None
            if not has_own_parts(module, kinds):
                return None
            seen = self._seen = _Seen(module, make(module))
        return seen.made if also(module) else None

    def __deepcopy__(self, memo: dict[int, object]) -> OwnParts[T]:
        return OwnParts(*self._given)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnParts, self._given


def has_own_parts(module: nn.Module, kinds: Mapping[str, tuple[type[nn.Module], ...]]) -> bool:
    """Whether the parts of ``module`` are those, of these classes exactly, without hooks."""
    parts = dict(module.named_modules(remove_duplicate=False))
    del parts[""]
    return parts.keys() == kinds.keys() and all(
        type(part) in kinds[name] and is_plain(part) for name, part in parts.items()
    )


class _Seen(Generic[T]):
    """A module that was found to have its own parts."""

    def __init__(self, module: nn.Module, made: T) -> None:
        self.made = made
        self._module = module
        self._children = tuple(module._modules.values())
        parts = list(module.modules())[1:]
        self._parts = [(part, type(part), part.__dict__, tuple(part._modules.values())) for part in parts]

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is this module, and has no other parts, hooks or functions now."""
        if module is not self._module or tuple(module._modules.values()) != self._children:
            return False
        for part, kind, attributes, children in self._parts:
            if (
                type(part) is not kind
                or attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or attributes["_backward_hooks"]
                or attributes["_backward_pre_hooks"]
                or "forward" in attributes
                or tuple(attributes["_modules"].values()) != children
            ):
                return False
        return True

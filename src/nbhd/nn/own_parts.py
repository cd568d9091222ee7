"""Notice when a module is not made of nothing but the parts it was written with any more.

A module that computes with its parts' parameters instead of calling them has to know that calling them would do the
same: that they are of the classes it knows, and that nobody has put hooks, adapters or functions of his own there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nbhd.nn.linear import is_plain


class Kinds:
    """The parts that a module may have; to be made when their classes are imported, before anybody changes these.

    Args:
        of_names: for each name of a part, the classes that it may have.
    """

    def __init__(self, of_names: Mapping[str, tuple[type[nn.Module], ...]]) -> None:
        self._of_names = of_names
        self._forwards = {kind: kind.forward for some in of_names.values() for kind in some}

    def are_all_of(self, module: nn.Module) -> bool:
        """Whether the parts of ``module`` are those, of these classes exactly, without hooks."""
        parts = dict(module.named_modules(remove_duplicate=False))
        del parts[""]
        return (
            parts.keys() == self._of_names.keys()
            and all(type(part) in self._of_names[name] and is_plain(part) for name, part in parts.items())
            and self.are_as_they_were()
        )

    def are_in(self, module: nn.Module) -> bool:
        """Whether they are among the parts of ``module``, without hooks; for a compiler to look into."""
        for name, kinds in self._of_names.items():
            part: Any = module
            for step in name.split("."):
                part = getattr(part, step, None)
            if type(part) not in kinds or not is_plain(part):
                return False
        return not nn.modules.module._has_any_global_hook()

    def are_as_they_were(self) -> bool:
        """Whether nobody has put another ``forward`` into the classes, or another way to call all modules."""
        return (nn.Module.__call__, nn.Module._call_impl) == _CALLS and not any(
            kind.forward is not forward for kind, forward in self._forwards.items()
        )


_CALLS = nn.Module.__call__, nn.Module._call_impl


class OwnParts:
    """Tells whether a module has its own parts, for less than looking at them closely each time.

    It keeps neither the module nor its parts alive.

    Args:
        kinds: all parts have to be there.
    """

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._seen: _Seen | None = None  # threads replace it as a whole

    def seen(self, module: nn.Module) -> object | None:
        """None if ``module`` has not its own parts, or there are hooks for all modules; the same object while it has.

        They are looked at closely the first time, and again when they are others. The module's own hooks do not matter:
        they are run by whoever calls it.
        """
        if nn.modules.module._has_any_global_hook() or not self._kinds.are_as_they_were():
            return None
        seen = self._seen
        if seen is None or not seen.is_of(module):
            self._seen = None
            if not self._kinds.are_all_of(module):
                return None
            seen = self._seen = _Seen(module)
        return seen


class _Seen:
    """A module that was found to have its own parts."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._parts = [(weakref.ref(p), type(p), tuple(map(_reference, p._modules.values()))) for p in parts]

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is this module, and has no other parts, hooks or functions now."""
        is_part = False  # but the module itself, the first
        for of_part, kind, of_children in self._parts:
            part = of_part()
            if part is None or not (is_part or part is module):
                return False
            attributes = part.__dict__
            children = attributes["_modules"]
            if len(children) != len(of_children):
                return False
            # most have none
            if children and any(c is not of() for c, of in zip(children.values(), of_children, strict=True)):
                return False
            if is_part and (
                type(part) is not kind
                or attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or attributes["_backward_hooks"]
                or attributes["_backward_pre_hooks"]
                or "forward" in attributes
                or part._compiled_call_impl is not None
            ):
                return False
            is_part = True
        return True


def _reference(module: nn.Module | None) -> Callable[[], nn.Module | None]:
    return _nothing if module is None else weakref.ref(module)


def _nothing() -> None:
    return None

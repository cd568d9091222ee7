"""What PyTorch is doing while it calls us: making a graph, or transforming a function."""

from __future__ import annotations

import torch
from torch.utils._device import DeviceContext


def makes_a_graph() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` is recording."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


# TODO: drop when torch 2.6 is no longer supported, which cannot tell that a graph is exported
_KNOWS_EXPORTS = hasattr(torch.compiler, "is_exporting")


def makes_a_graph_for_this_machine() -> bool:
    """Whether the graph that is made is `torch.compile`'s, for this machine, which may have operators of ours."""
    return not torch.jit.is_tracing() and _KNOWS_EXPORTS and not torch.compiler.is_exporting()


def is_transformed() -> bool:
    """Whether ``torch.func`` or dual numbers are at work, which ask for rules that some operators do not have."""
    in_function = torch._C._functorch.peek_interpreter_stack() is not None
    return in_function or torch.autograd.forward_ad._current_level >= 0


def has_function_mode() -> bool:
    """Whether a mode watches functions, other than the one that ``torch.set_default_device`` leaves for good."""
    modes = torch._C._len_torch_function_stack()
    return modes > 1 or (modes == 1 and type(torch._C._get_function_stack_at(0)) is not DeviceContext)

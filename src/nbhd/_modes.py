"""What PyTorch is doing while it calls us: making a graph, or transforming a function."""

from __future__ import annotations

import torch


def makes_a_graph() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` is recording."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Whether ``torch.func`` or dual numbers are at work, which ask for rules that some operators do not have."""
    in_function = torch._C._functorch.peek_interpreter_stack() is not None
    return in_function or torch.autograd.forward_ad._current_level >= 0

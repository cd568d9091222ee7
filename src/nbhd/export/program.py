"""An exported program without the operators of nbhd: it runs where only PyTorch is."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from nbhd.export import operator


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators of nbhd in terms of PyTorch's own, in the form of a table for ``run_decompositions``.

    `lower` does the same faster, because layers that see maps of the same size share the work.
    """
    import nbhd.ops  # noqa: F401  (registers them)

    return {
        torch.ops.nbhd.na_forward.default: operator.attend,
        torch.ops.nbhd.scores.default: operator.scores,
        torch.ops.nbhd.weighted_sum.default: operator.weighted_sum,
    }


@torch.no_grad()
def lower(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replace every call of an nbhd operator by PyTorch's own operations, in place; sizes stay dynamic.

    Args:
        program: of ``torch.export.export``, for inference.

    Returns:
        The same program. It needs no nbhd to be loaded or run.
    """
    table = decompositions()
    graph = program.graph_module.graph
    traced: dict[Any, torch.fx.Graph] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in table:
            continue
        assert not node.kwargs
        values = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in node.args]
        key = (node.target, tuple(_description(value) for value in values))
        if key not in traced:
            traced[key] = _trace(table[node.target], values)
        _inline(graph, node, traced[key])
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return program


def _description(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(tuple(value.shape)), str(value.stride()), value.dtype, str(value.device)
    return repr(value)


def _trace(function: Callable[..., Any], values: list[Any]) -> torch.fx.Graph:
    """A graph from the tensors among ``values`` to the results."""
    tensors: list[Any] = [value for value in values if isinstance(value, Tensor)]

    def call(*given: Tensor) -> Any:
        rest = iter(given)
        return function(*(next(rest) if isinstance(value, Tensor) else value for value in values))

    with tensors[0].fake_mode:
        graph: torch.fx.Graph = make_fx(call)(*tensors).graph
    return graph


def _inline(graph: torch.fx.Graph, node: torch.fx.Node, body: torch.fx.Graph) -> None:
    given = iter(arg for arg in node.args if isinstance(arg, torch.fx.Node))
    copies: dict[torch.fx.Node, Any] = {}
    results: Any = None
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(given)
            elif inner.op == "output":
                results = torch.fx.node.map_arg(inner.args[0], copies.__getitem__)
            else:
                copies[inner] = copy = graph.node_copy(inner, copies.__getitem__)
                copy.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    if isinstance(results, torch.fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            assert user.target is python_operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)

"""What PyTorch's counter of operations says of the operators, against what it says of its own attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._ops import OpOverloadPacket
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import nbhd
from nbhd.flops import FORMULAS
from nbhd.models import NatConfig, NatModel
from tests.processes import process


def counted(run: Any) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


def inputs(*shape: int, value_dim: int | None = None) -> list[torch.Tensor]:
    shapes = [shape, shape, (*shape[:-1], value_dim or shape[-1])]
    return [torch.randn(s, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("shape", [(2, 6, 3, 8), (1, 4, 5, 2, 16), (2, 2, 3, 4, 1, 8)])
def test_a_window_of_the_whole_map_counts_as_dense_attention(shape: tuple[int, ...]) -> None:
    spatial = shape[1:-2]
    attend = [nbhd.na1d, nbhd.na2d, nbhd.na3d][len(spatial) - 1]
    query, key, value = inputs(*shape)
    ours = counted(lambda: attend(query, key, value, spatial).sum().backward())

    batch, heads, dim = shape[0], shape[-2], shape[-1]
    dense = [(batch, heads, math.prod(spatial), dim)] * 3
    theirs = [sdpa_flop_count(*dense), sdpa_backward_flop_count(dense[0], *dense)]
    assert set(ours) == {"nbhd.na_forward", "nbhd.na_backward"}
    assert list(ours.values()) == theirs


def test_a_window_counts_its_keys_and_both_dimensions() -> None:
    query, key, value = inputs(2, 9, 10, 4, 8, value_dim=12)
    ours = counted(lambda: nbhd.na2d(query, key, value, (3, 5), dilation=2, stride=(2, 1)).sum().backward())
    pairs = 2 * 9 * 10 * 4 * 3 * 5
    assert ours == {"nbhd.na_forward": 2 * pairs * (8 + 12), "nbhd.na_backward": 2 * pairs * (3 * 8 + 2 * 12)}


def test_the_unfused_pair_counts_as_the_fused_operator() -> None:
    query, key, value = inputs(1, 7, 7, 2, 8)

    def pair() -> None:
        nbhd.apply_attention_weights(nbhd.attention_weights(query, key, 3), value, 3).sum().backward()

    ours = counted(pair)
    fused = counted(lambda: nbhd.na2d(query, key, value, 3).sum().backward())
    assert ours["nbhd.scores"] + ours["nbhd.weighted_sum"] == fused["nbhd.na_forward"]
    # the weights are kept, so that the scores are not made again
    scores = fused["nbhd.na_forward"] // 2
    assert ours["nbhd.scores_backward"] + ours["nbhd.weighted_sum_backward"] == fused["nbhd.na_backward"] - scores


def test_a_model_counts_its_attention() -> None:
    config = NatConfig(embed_dim=16, depths=[2, 1], num_heads=[1, 2], kernel_size=3)
    counts = counted(lambda: NatModel(config).eval()(torch.randn(1, 3, 64, 64)))
    # two layers of 16 channels at 16x16, one of 32 at 8x8, for scores and values
    assert counts["nbhd.na_forward"] == 2 * 9 * 2 * (2 * 16 * 16 * 16 + 8 * 8 * 32)


def test_compiled_graphs_have_formulas_for_all_operators() -> None:
    operators = {name for name in dir(torch.ops.nbhd) if isinstance(getattr(torch.ops.nbhd, name), OpOverloadPacket)}
    assert set(FORMULAS) == operators
    layer, weight = torch.randn(5, 6), torch.randn(7, 6)
    ours = counted(lambda: torch.ops.nbhd.linear(layer, weight, None))
    assert ours == {"nbhd.linear": 2 * 5 * 6 * 7}
    ours = counted(lambda: torch.ops.nbhd.linear_d_weight(torch.randn(5, 7), layer))
    assert ours == {"nbhd.linear_d_weight": 2 * 5 * 6 * 7}


@pytest.mark.parametrize("learns", ["all", "input", "hidden", "last"])
def test_layers_count_as_the_plain_ones(learns: str) -> None:
    batch, norm = torch.randn(5, 6), (torch.randn(6), torch.randn(6))
    layers = [(torch.randn(7, 6), torch.randn(7)), (torch.randn(8, 7), torch.randn(8))]
    tensors = {"input": [batch, *norm], "hidden": [*layers[0]], "last": [*layers[1]]}
    for name, some in tensors.items():
        for tensor in some:
            tensor.requires_grad_(learns in (name, "all"))

    def joined() -> None:
        outputs = torch.ops.nbhd.layers(
            batch, None, *norm, *layers[0], *layers[1], *(None,) * 4, 1e-5, 1.0, False, True
        )
        outputs[0].sum().backward()

    def plain() -> None:
        x = functional.layer_norm(batch, (6,), *norm)
        functional.linear(functional.gelu(functional.linear(x, *layers[0])), *layers[1]).sum().backward()

    assert sum(counted(joined).values()) == sum(counted(plain).values()) > 0


COUNT = """
import torch
query = torch.randn(1, 8, 8, 1, 16)
with FlopCounterMode(display=False) as counter:
    nbhd.na2d(query, query, query, 3)
print(counter.get_total_flops())
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, nbhd; assert 'triton' not in sys.modules; from torch.utils.flop_counter import FlopCounterMode",
        "from torch.utils.flop_counter import FlopCounterMode; import nbhd",
    ],
)
def test_the_order_of_imports_does_not_matter(imports: str) -> None:
    assert process("-c", imports + COUNT, interpret=False).strip() == str(2 * 64 * 9 * 32)

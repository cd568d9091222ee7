"""Whether an exported file computes what its model does."""

from __future__ import annotations

from typing import Any

import torch

from nbhd.export.runtime import ExportedModel
from nbhd.export.subject import Facts, Outputs

#: Batch, height and width: a usual one, odd ones, and maps smaller than any window.
SIZES = ((1, 224, 224), (2, 97, 131), (3, 20, 13))


def largest_difference(model: Any, exported: ExportedModel, facts: Facts) -> float:
    """The largest absolute difference of any output at several sizes, as a share of that output's largest value."""
    generator = torch.Generator().manual_seed(0)
    reference = Outputs(model, facts.task).eval()
    sizes = SIZES if facts.fixed_size is None else tuple((batch, *facts.fixed_size) for batch in (1, 3))
    worst = 0.0
    for batch, height, width in sizes:
        pixels = torch.randn(batch, facts.channels, height, width, generator=generator)
        expected = reference(pixels)
        named = zip(facts.outputs, [expected] if isinstance(expected, torch.Tensor) else expected, strict=True)
        found = exported(pixels)
        for name, tensor in named:
            difference = (getattr(found, name) - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6)
            worst = max(worst, float(difference))
    return worst

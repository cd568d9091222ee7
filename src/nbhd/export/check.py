"""Whether an exported file computes what its model does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nbhd.errors import BackendError, CheckpointError
from nbhd.export.runtime import ExportedModel
from nbhd.export.subject import Facts, Outputs

#: Batch, height and width: a usual one, odd ones, and maps smaller than any window.
SIZES = ((1, 224, 224), (2, 97, 131), (3, 20, 13))


def largest_difference(
    model: Any, exported: ExportedModel, facts: Facts, batches: Iterable[Tensor] | None = None
) -> float:
    """The largest absolute difference of any output, as a share of that output's largest value.

    Args:
        model: what the file was made from.
        exported: the file.
        facts: what it holds.
        batches: ``pixel_values`` to compare on; default: noise at several sizes.

    Returns:
        Infinity where an output of the file is NaN or infinite.

    Raises:
        CheckpointError: an output of the model itself is NaN or infinite.
        BackendError: an output of the file has another shape than the model's.
    """
    reference = Outputs(model, facts.task).eval()
    differences, largest = ([0.0] * len(facts.outputs) for _ in range(2))
    for pixels in _noise(facts) if batches is None else batches:
        expected = reference(pixels)
        named = zip(facts.outputs, [expected] if isinstance(expected, Tensor) else expected, strict=True)
        found = exported(pixels)
        for i, (name, wanted) in enumerate(named):
            output = getattr(found, name)
            if not wanted.isfinite().all():
                raise CheckpointError(
                    f"the model's own {name} is NaN or infinite for finite pixels: its weights are damaged, or too "
                    "large. Export one whose outputs are finite."
                )
            if output.shape != wanted.shape:
                raise BackendError(
                    f"the file's {name} has the shape {tuple(output.shape)}, the model's {tuple(wanted.shape)}. "
                    "Please report it."
                )
            difference = float((output - wanted).abs().max())
            if not math.isfinite(difference):
                return math.inf
            differences[i] = max(differences[i], difference)
            largest[i] = max(largest[i], float(wanted.abs().max()))
    return max(difference / max(value, 1e-6) for difference, value in zip(differences, largest, strict=True))


def _noise(facts: Facts) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = SIZES if facts.fixed_size is None else tuple((batch, *facts.fixed_size) for batch in (1, 3))
    for batch, height, width in sizes:
        yield torch.randn(batch, facts.channels, height, width, generator=generator)

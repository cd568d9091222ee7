"""What the machine can do at a number of threads, measured in the same process as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.sampling import best_of, matrix_product_rate

#: What the entries mean; the unit is in the name.
MEANING = {
    "mm_float32_flop_per_s": "torch.mm of 2048 x 2048 matrices",
    "mm_bfloat16_flop_per_s": "torch.mm of 512 x 512 matrices in bfloat16",
    "copy_bytes_per_s": "tensor.copy_ of 256 MiB, bytes read plus bytes written",
    "fresh_memory_bytes_per_s": "filling 256 MiB that were just allocated: what a large output costs by being new",
}


def measure(threads: tuple[int, ...], is_quick: bool) -> dict[str, dict[str, list[float]]]:
    """``{threads: {name: samples}}``, the names being those of ``MEANING``."""
    size, small, numbers, times = (128, 64, 1 << 16, 2) if is_quick else (2048, 512, 1 << 26, 5)
    before = torch.get_num_threads()
    source, target = torch.ones(numbers), torch.ones(numbers)

    def rate(work: float, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return work / (time.perf_counter() - start)

    found = {}
    try:
        for t in threads:
            torch.set_num_threads(t)
            measured: dict[str, Callable[[], float]] = {
                "mm_float32_flop_per_s": lambda: matrix_product_rate(size),
                "mm_bfloat16_flop_per_s": lambda: matrix_product_rate(small, torch.bfloat16),
                "copy_bytes_per_s": lambda: rate(8.0 * numbers, lambda: target.copy_(source)),
                "fresh_memory_bytes_per_s": lambda: rate(4.0 * numbers, lambda: torch.empty(numbers).fill_(1.0)),
            }
            found[str(t)] = {name: best_of(call, times) for name, call in measured.items()}
    finally:
        torch.set_num_threads(before)
    return found

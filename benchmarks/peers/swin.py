"""Swin's window attention (Liu et al. 2021, arXiv:2103.14030) as its layer does it, without the two projections.

    x [batch, X, Y, channels]  ->  rolled by -shift, cut into windows     before the projections: one tensor
                                   (it stands in for the query)
    key, value                     arrive so cut                          the projections leave them there
    bias                           looked up in its table at each call, the shift's mask added
    out                        ->  windows put together, rolled back      after the projection: one tensor

A map that the window does not divide is padded at its lower and right border, as transformers does. The mask of the
shift is made once, as in the original code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import Case
from benchmarks.peers.inputs import Inputs, tensors
from benchmarks.subject import NotHere, Subject, attention_subject


def prepare_shifted_sdpa(case: Case) -> Subject:
    return _prepare("swin-shifted-sdpa", case, is_shifted=True, is_eager=False)


def prepare_shifted_eager(case: Case) -> Subject:
    return _prepare("swin-shifted-eager", case, is_shifted=True, is_eager=True)


def prepare_unshifted_sdpa(case: Case) -> Subject:
    return _prepare("swin-unshifted-sdpa", case, is_shifted=False, is_eager=False)


def _prepare(name: str, case: Case, is_shifted: bool, is_eager: bool) -> Subject:
    attend, leaves = prepared(case, tensors(case), is_shifted=is_shifted, is_eager=is_eager)
    x, key, value, *_ = leaves
    return attention_subject(name, lambda: attend(x, key, value), leaves, case.queries, None)


def prepared(
    case: Case, inputs: Inputs, *, is_shifted: bool = True, is_eager: bool = False
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[Tensor]]:
    """The attention as a function of x, key and value, and its leaves made of a case's tensors: those, then the table.

    Everything lies where ``inputs`` do.

    Raises:
        NotHere: Swin's windows cannot do the case.
    """
    if len(case.spatial) != 2 or case.kernel_size[0] != case.kernel_size[1]:
        raise NotHere("Swin's windows are squares on a map of two axes")
    if any(d != 1 for d in case.dilation) or any(case.is_causal):
        raise NotHere("Swin's windows are neither dilated nor causal")
    window, heads, dim = case.kernel_size[0], case.heads, case.head_dim
    rows, columns = (-(-length // window) * window for length in case.spatial)  # padded
    # Where one window covers the map Swin does not shift.
    shift = window // 2 if is_shifted and min(case.spatial) > window else 0
    count = (rows // window) * (columns // window)
    area = window * window
    device = inputs.query.device
    with torch.no_grad():
        x = inputs.query.flatten(-2).detach().requires_grad_()
        key, value = (
            _partition(_roll(_pad(t.flatten(-2), rows, columns), -shift), window)
            .view(-1, area, heads, dim)
            .contiguous()
            .requires_grad_()
            for t in (inputs.key, inputs.value)
        )
    # Swin keeps its table as [entries, heads]; without a bias in the case there is none here either.
    table = None if inputs.bias is None else inputs.bias.detach().flatten(1).t().contiguous().to(case.torch_dtype)
    table = None if table is None else table.requires_grad_()
    index = _bias_index(window).to(device)
    mask = _shift_mask(rows, columns, window, shift).to(device, case.torch_dtype) if shift else None
    scale = dim**-0.5
    dense = None if mask is None else mask[None, :, None].expand(case.batch, -1, -1, -1, -1).flatten(0, 1)

    def attend(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = _partition(_roll(_pad(x, rows, columns), -shift), window).view(-1, area, heads, dim)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        added = None
        if table is not None:
            added = table[index].view(area, area, heads).permute(2, 0, 1).contiguous()[None]
        if dense is not None:
            added = dense if added is None else added + dense
        if is_eager:
            scores = torch.matmul(q, k.transpose(-1, -2)) * scale
            if added is not None:
                scores = scores + added
            out = torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
        windows = out.transpose(1, 2).reshape(-1, window, window, heads * dim)
        whole = _roll(_merge(windows, window, rows, columns), shift)
        return whole[:, : case.spatial[0], : case.spatial[1]].contiguous()

    assert count * area == rows * columns
    return attend, [t for t in (x, key, value, table) if t is not None]


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    if x.shape[1:3] == (rows, columns):
        return x
    return functional.pad(x, (0, 0, 0, columns - x.shape[2], 0, rows - x.shape[1]))


def _roll(x: Tensor, by: int) -> Tensor:
    return torch.roll(x, (by, by), (1, 2)) if by else x


def _partition(x: Tensor, window: int) -> Tensor:
    """``[batch, X, Y, channels]`` to ``[batch * windows, window, window, channels]``, in memory."""
    batch, rows, columns, channels = x.shape
    x = x.view(batch, rows // window, window, columns // window, window, channels)
    return x.transpose(2, 3).contiguous().view(-1, window, window, channels)


def _merge(windows: Tensor, window: int, rows: int, columns: int) -> Tensor:
    """The inverse of ``_partition``."""
    channels = windows.shape[-1]
    x = windows.view(-1, rows // window, columns // window, window, window, channels)
    return x.transpose(2, 3).contiguous().view(-1, rows, columns, channels)


@functools.cache
def _bias_index(window: int) -> Tensor:
    """``[window**4]``: the table's row for each query and key of a window."""
    place = torch.arange(window * window)
    x, y = place // window, place % window
    dx, dy = x[:, None] - x[None] + window - 1, y[:, None] - y[None] + window - 1
    return (dx * (2 * window - 1) + dy).flatten()


def _shift_mask(rows: int, columns: int, window: int, shift: int) -> Tensor:
    """``[windows, window**2, window**2]``: -100 between positions that only the roll made neighbours, else 0."""

    def region(length: int) -> Tensor:
        i = torch.arange(length)
        return (i >= length - window).long() + (i >= length - shift).long()

    regions = region(rows)[:, None] * 3 + region(columns)[None]
    cut = _partition(regions[None, :, :, None], window).view(-1, window * window)
    return torch.where(cut[:, :, None] == cut[:, None, :], 0.0, -100.0)

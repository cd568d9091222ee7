"""docs/attention.md: its snippets run, and its table is what the operator does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import nbhd
from nbhd.functional import attention_weights

PAGE = (Path(__file__).parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROWS = re.findall(r"^\| (plain|`[^|]*`) \|(.*)\|$", PAGE, re.MULTILINE)


def test_there_is_something_to_test():
    assert len(SNIPPETS) == 7
    assert len(ROWS) == 5


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number):
    torch.manual_seed(0)
    exec(compile(SNIPPETS[number], f"attention.md, snippet {number + 1}", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize(("arguments", "cells"), ROWS)
def test_row_of_the_table(arguments, cells):
    """Values that are one-hot by position show what a query saw."""
    options = {} if arguments == "plain" else eval(f"dict({arguments.strip('`')})")
    flat = torch.zeros(1, 8, 1, 4)
    seen = nbhd.na1d(flat, flat, torch.eye(8)[None, :, None], 3, **options)[0, :, 0] > 0
    assert [" ".join(str(int(i)) for i in row.nonzero()) for row in seen] == [cell.strip() for cell in cells.split("|")]
    assert (attention_weights(flat, flat, 3, **options) > 0).sum(-1).flatten().tolist() == seen.sum(-1).tolist()

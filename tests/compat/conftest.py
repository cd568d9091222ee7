from __future__ import annotations

import pytest
import torch

from nbhd.compat.natten import uninstall
from nbhd.compat.natten.core import knobs


@pytest.fixture(autouse=True)
def _fresh():
    """Each test starts with no warning given yet, and leaves no stand-in behind."""
    torch.manual_seed(0)
    knobs.forget()
    yield
    uninstall()

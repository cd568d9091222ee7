"""What tests need to know about files and users."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534


@contextlib.contextmanager
def as_ordinary_user(folder: Path) -> Iterator[None]:
    """Run a block without the rights of an administrator, who may read everything; ``folder`` stays reachable."""
    if not hasattr(os, "geteuid"):
        pytest.skip("permissions work differently on this system")
    if os.geteuid() != 0:
        yield
        return
    for parent in (folder, *folder.parents):
        if parent == folder or "pytest" in parent.name:
            parent.chmod((parent.stat().st_mode & 0o7777) | 0o055)
    os.seteuid(NOBODY)
    try:
        if not os.access(folder, os.R_OK, effective_ids=True):
            pytest.skip(f"another user cannot reach {folder}")
        yield
    finally:
        os.seteuid(0)

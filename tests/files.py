"""What tests need to know about files and users."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534


@contextlib.contextmanager
def as_ordinary_user(*folders: Path) -> Iterator[None]:
    """Run a block without the rights of an administrator, who may read everything; ``folders`` stay reachable."""
    if not hasattr(os, "geteuid"):
        pytest.skip("permissions work differently on this system")
    if os.geteuid() != 0:
        yield
        return
    for folder in folders:
        for parent in (folder, *folder.parents):
            if parent in folders or "pytest-" in str(parent):
                parent.chmod((parent.stat().st_mode & 0o7777) | 0o055)
    os.seteuid(NOBODY)
    try:
        for folder in folders:
            if not os.access(folder, os.R_OK, effective_ids=True):
                pytest.skip(f"another user cannot reach {folder}")
        yield
    finally:
        os.seteuid(0)

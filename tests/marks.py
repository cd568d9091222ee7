"""What some machines have and others have not, as marks of tests."""

from __future__ import annotations

import pytest

from nbhd.backends import cpu, triton

needs_triton = pytest.mark.skipif(
    triton.why_unusable() is not None, reason=f"needs Triton, which has wheels for Linux alone: {triton.why_unusable()}"
)

needs_library = pytest.mark.skipif(
    cpu.why_unusable() is not None, reason=f"needs the native library: {cpu.why_unusable()}"
)

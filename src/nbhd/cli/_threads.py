"""How torch's threads behave beside others."""

from __future__ import annotations

import os


def let_others_run() -> None:
    """Make idle OpenMP threads sleep instead of spin; call it before torch is imported.

    Spinning threads take the cores from the threads that decode and from other programs: on two busy cores the shipped
    model then takes 2.5 times the processor time an image and up to 4 times as long. ``OMP_WAIT_POLICY`` in the
    environment wins.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""``natten.utils.log``: a logger of the standard library. NATTEN's own writes to standard output at level INFO."""

from __future__ import annotations

import logging

__all__ = ["get_logger"]


def get_logger(name: str = "natten") -> logging.Logger:
    """The standard logger ``name``, silent below WARNING unless logging is configured."""
    return logging.getLogger(name)

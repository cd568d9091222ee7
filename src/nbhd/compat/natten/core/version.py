"""``natten.version`` of 0.20 and later. ``install()`` gives it the version that was asked for."""

from nbhd.compat.natten._finder import NEWEST

__version__ = NEWEST

__all__ = ["__version__"]

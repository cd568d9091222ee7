"""``natten.utils`` of 0.20 and later."""

from nbhd.compat.natten.core.checks import check_all_args

__all__ = ["check_all_args"]

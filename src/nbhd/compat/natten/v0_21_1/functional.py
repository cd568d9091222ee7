"""``natten.functional`` of 0.21.0 and 0.21.1: as 0.20."""

from nbhd.compat.natten.core.generic import generic
from nbhd.compat.natten.core.unfused_names import old_names
from nbhd.compat.natten.v0_20.functional import attention, merge_attentions

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention_generic",
]

_ERA = "0.21.1"

neighborhood_attention_generic = generic(_ERA, __name__)
na1d, na2d, na3d = (generic(_ERA, __name__, axes) for axes in (1, 2, 3))
_old = old_names(__name__)
globals().update(_old)
__all__ += [*_old]

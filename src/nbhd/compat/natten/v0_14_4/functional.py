"""``natten.functional`` up to 0.14.4, heads first. The window follows from the bias or the attention."""

from nbhd.compat.natten.core.unfused_names import av_from_attention, qkrpb_from_bias, with_apply

__all__ = [
    "NATTEN1DAVFunction",
    "NATTEN1DQKRPBFunction",
    "NATTEN2DAVFunction",
    "NATTEN2DQKRPBFunction",
    "natten1dav",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqkrpb",
]

_ERA = "up to 0.14.4"

natten1dqkrpb, natten2dqkrpb = (qkrpb_from_bias(_ERA, __name__, axes) for axes in (1, 2))
natten1dav, natten2dav = (av_from_attention(_ERA, __name__, axes) for axes in (1, 2))

NATTEN1DQKRPBFunction = with_apply(natten1dqkrpb, "NATTEN1DQKRPBFunction")
NATTEN2DQKRPBFunction = with_apply(natten2dqkrpb, "NATTEN2DQKRPBFunction")
NATTEN1DAVFunction = with_apply(natten1dav, "NATTEN1DAVFunction")
NATTEN2DAVFunction = with_apply(natten2dav, "NATTEN2DAVFunction")

"""``natten.functional`` of 0.14.5 and 0.14.6, heads first."""

from nbhd.compat.natten.core.unfused_names import plain_av, plain_qk, qkrpb, with_apply

__all__ = [
    "NATTEN1DAVFunction",
    "NATTEN1DQKRPBFunction",
    "NATTEN2DAVFunction",
    "NATTEN2DQKRPBFunction",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
]

_ERA = "0.14.6"

natten1dqkrpb, natten2dqkrpb = (qkrpb(_ERA, __name__, axes) for axes in (1, 2))
natten1dqk, natten2dqk = (plain_qk(_ERA, __name__, axes, f"natten{axes}dqk") for axes in (1, 2))
natten1dav, natten2dav = (plain_av(_ERA, __name__, axes, f"natten{axes}dav") for axes in (1, 2))

NATTEN1DQKRPBFunction = with_apply(natten1dqkrpb, "NATTEN1DQKRPBFunction")
NATTEN2DQKRPBFunction = with_apply(natten2dqkrpb, "NATTEN2DQKRPBFunction")
NATTEN1DAVFunction = with_apply(natten1dav, "NATTEN1DAVFunction")
NATTEN2DAVFunction = with_apply(natten2dav, "NATTEN2DAVFunction")

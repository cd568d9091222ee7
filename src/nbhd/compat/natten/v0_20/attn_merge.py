"""``natten.attn_merge`` of 0.20 to 0.21.1."""

from nbhd.compat.natten.v0_20.functional import merge_attentions

__all__ = ["merge_attentions"]

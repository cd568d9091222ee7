"""``natten.attn_merge`` of 0.21.5 to 0.21.7."""

from nbhd.compat.natten.v0_21.functional import merge_attentions

__all__ = ["merge_attentions"]

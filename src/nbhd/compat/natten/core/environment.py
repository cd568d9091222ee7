"""``natten._environment``."""

__all__ = ["HAS_LIBNATTEN"]

#: True, because callers take it for "the operators work".
HAS_LIBNATTEN = True

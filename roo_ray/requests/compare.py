"""``roo_ray.sources.compare``: sources need it too, and imports run downwards only."""

from roo_ray.sources.compare import (
    TOKENS_AT_ONCE,
    Ints,
    Mask,
    differing_rows,
    digest_rows,
    same_as_previous,
    sort_codes,
)

__all__ = [
    "TOKENS_AT_ONCE",
    "Ints",
    "Mask",
    "differing_rows",
    "digest_rows",
    "same_as_previous",
    "sort_codes",
]

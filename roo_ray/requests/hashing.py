"""``roo_ray.sources.hashing``: sources need it too, and imports run downwards only."""

from roo_ray.sources.hashing import (
    NULL_HASH,
    Hashes,
    hash_array,
    hash_rows,
    mix64,
)

__all__ = [
    "NULL_HASH",
    "Hashes",
    "hash_array",
    "hash_rows",
    "mix64",
]

"""A schema with tables that bags alone read: of requests, of impressions, and of both."""

from __future__ import annotations

from roo_ray.schema import Schema, parse_schema
from tests.models.batches import SCHEMA

BAGS = SCHEMA.replace(
    "features:",
    """  hobby: {rows: 30, dim: 8}
  brand: {rows: 24, dim: 8}
  genre: {rows: 9, dim: 4}
features:
  - {name: hobbies, level: request, kind: ids, columns: hobby_ids, table: hobby, pooling: sum, max_length: 9}
  - {name: dislikes, level: request, kind: ids, columns: disliked_ids, table: hobby, pooling: mean, max_length: 9}
  - {name: brands, level: impression, kind: ids, columns: brand_ids, table: brand, pooling: mean, max_length: 7}
  - {name: genres, level: impression, kind: ids, columns: genre_ids, table: genre, pooling: sum, max_length: 7}
  - {name: themes, level: impression, kind: ids, columns: theme_ids, table: genre, pooling: mean, max_length: 7}""",
)
POOLED = ["hobby", "brand", "genre", "tag"]  # bags of both levels read tag


def bags_schema() -> Schema:
    """The test schema with more bags: two features of one table that are pooled in different ways, on both levels."""
    return parse_schema(BAGS)

"""Sources of rows: one module per format."""

from __future__ import annotations

from roo_ray.config import EbnerdSource, ImpressionSource, Source, SyntheticSource
from roo_ray.schema import Schema
from roo_ray.sources.base import Source as RowSource
from roo_ray.sources.ebnerd import open_ebnerd
from roo_ray.sources.impressions import open_impressions
from roo_ray.sources.synthetic import require_complete


def open_source(source: Source, schema: Schema) -> RowSource:
    """Opens a configured source (for a synthetic one: the log that the generator wrote).

    Raises DataError where its files are missing, broken or do not fit the schema.
    """
    if isinstance(source, SyntheticSource):
        require_complete(source.path)
        return open_impressions([source.path], schema)
    if isinstance(source, ImpressionSource):
        return open_impressions(source.path, schema)
    assert isinstance(source, EbnerdSource)
    return open_ebnerd(source.path, schema)

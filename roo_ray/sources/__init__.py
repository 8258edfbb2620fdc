"""Sources of rows: one module per format."""

from __future__ import annotations

from roo_ray.schema import Schema
from roo_ray.source_config import (
    EbnerdSource,
    EventLogsSource,
    ImpressionSource,
    KuairandSource,
    MindSource,
    MovielensSource,
    RequestRowsSource,
    Source,
    SyntheticSource,
)
from roo_ray.sources.base import Source as RowSource
from roo_ray.sources.ebnerd import open_ebnerd
from roo_ray.sources.event_logs import open_event_logs
from roo_ray.sources.impressions import open_impressions
from roo_ray.sources.kuairand import open_kuairand
from roo_ray.sources.mind import open_mind
from roo_ray.sources.movielens import open_movielens
from roo_ray.sources.request_rows import open_request_rows
from roo_ray.sources.synthetic import require_complete


def open_source(source: Source, schema: Schema) -> RowSource:
    """Opens a configured source (for a synthetic one: the log that the generator wrote).

    Raises DataError where its files are missing, broken or do not fit the schema, ConfigError where its settings
    do not fit the schema.
    """
    if isinstance(source, SyntheticSource):
        require_complete(source.path)
        return open_impressions([source.path], schema)
    if isinstance(source, ImpressionSource):
        return open_impressions(source.path, schema)
    if isinstance(source, RequestRowsSource):
        return open_request_rows(source, schema)
    if isinstance(source, EventLogsSource):
        return open_event_logs(source, schema)
    if isinstance(source, MindSource):
        return open_mind(source, schema)
    if isinstance(source, KuairandSource):
        return open_kuairand(source, schema)
    if isinstance(source, MovielensSource):
        return open_movielens(source, schema)
    assert isinstance(source, EbnerdSource)
    return open_ebnerd(source.path, schema)

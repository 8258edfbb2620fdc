"""A data set that the tests of streams share."""

from __future__ import annotations

import pytest

from roo_ray.config import Holdout, Ingest
from roo_ray.ingest.stream import StreamSettings
from tests.ingest import shard_maker
from tests.ingest.shard_maker import Row, random_rows, write_data_set

COUNTS = [1 + (i * 5) % 9 for i in range(220)] + [40, 2, 60, 3]  # two requests exceed the budget of 24


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[StreamSettings, list[Row]]:
    """224 requests over 4 days in 38 units, the last day held out; settings of the thread reader."""
    folder, schema = tmp_path_factory.mktemp("stream"), shard_maker.schema()
    rows = random_rows(COUNTS[::-1], 9, days=4)
    write_data_set(folder, rows, schema, row_group=6, file_rows=20)
    ingest = Ingest(lanes=4, batch_impressions=24, window_units=3, reader="thread", prefetch_batches=2)
    how = StreamSettings(str(folder), 1, schema, ingest, Holdout(), "train", 11, (0, 1), "shuffled")
    return how, rows

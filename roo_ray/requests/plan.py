"""What every task of a build knows, and how a row's place is found."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from roo_ray.config import Build
from roo_ray.requests.exchange import Exchange, Survey
from roo_ray.requests.grouping import require_keys
from roo_ray.requests.report import FAIL
from roo_ray.requests.shards import WriteOptions, write_options
from roo_ray.requests.staging import Codec
from roo_ray.requests.two_days import NO_TWO_DAYS, TwoDays
from roo_ray.requests.uniqueness import ranges_for
from roo_ray.schema import Schema
from roo_ray.sources.base import JoinedSource, RowKind, Source
from roo_ray.sources.compare import Ints
from roo_ray.sources.hashing import Hashes, hash_array, hash_rows
from roo_ray.sources.times import epoch_seconds, utc_days
from roo_ray.storage import open_filesystem

COPY_OF = "_copy_of"


@dataclass(frozen=True)
class BuildPlan:
    """What every task of a build knows. ``staging``: folder of the files between the stages; ``kind``: what the
    source's rows are; ``exchange``, ``two_days`` (requests of several days, to be settled): known after the count;
    ``days``: the UTC days that are built, empty for all."""

    source: Source | JoinedSource
    schema: Schema
    build: Build
    kind: RowKind
    staging: str
    data_set: str
    version: int
    token: str = ""
    exchange: Exchange | None = None
    days: tuple[int, ...] = ()
    requests_expected: float = 0.0
    two_days: TwoDays = NO_TWO_DAYS

    @property
    def settles_days(self) -> bool:
        """Whether a rule says what becomes of a request with several days."""
        keys = self.schema.keys
        may_differ = self.kind == "impressions" and keys.time not in keys.request
        return may_differ and self.build.on_request_conflict != FAIL

    @property
    def codec(self) -> Codec:
        """How staging files are compressed."""
        chosen = self.build.staging_compression
        if chosen == "auto":
            return None if isinstance(open_filesystem(self.staging)[0], pafs.LocalFileSystem) else "lz4"
        return None if chosen == "none" else chosen

    @property
    def key_ranges(self) -> int:
        """Ranges of the hash in which request keys are compared."""
        return ranges_for(self.requests_expected)

    @property
    def copy_types(self) -> pa.Schema:
        """The columns that impressions of one request share."""
        return pa.schema([self.source.row_schema.field(name) for name in self.schema.request_columns])

    @property
    def own_types(self) -> pa.Schema:
        """The columns of an impression, and the number of its copy of the shared ones."""
        fields = [self.source.row_schema.field(name) for name in self.schema.impression_columns]
        return pa.schema([*fields, pa.field(COPY_OF, pa.int32())])

    @property
    def options(self) -> WriteOptions:
        """How shards are written."""
        return write_options(self.build)


@dataclass(frozen=True)
class Joined:
    """The rows that one bucket of a joined source gave, staged under ``name``; they are a unit of the next
    stages."""

    name: str
    survey: Survey


def key_hashes(table: pa.Table, schema: Schema) -> tuple[Ints, Hashes, Hashes]:
    """(rows,) each: the UTC day, the user's hash and the hash of the request key."""
    require_keys(table, schema)
    days = utc_days(epoch_seconds(table.column(schema.keys.time), schema.keys.time))
    return days, hash_array(table.column(schema.keys.user)), hash_rows(table, schema.keys.request)


def key_columns(schema: Schema) -> list[str]:
    """The columns that decide where a row goes."""
    return list(dict.fromkeys([*schema.keys.request, schema.keys.user, schema.keys.time]))

"""The parts of a config that say what becomes of the data: building, holding out, ingest (docs/data.md, ingest.md)."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from roo_ray.schema import Strict


def _day(value: Any) -> str:
    """``YYYY-MM-DD``; YAML reads a day as a date."""
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"'{value}' is no day; write it as YYYY-MM-DD") from None


def _as_days(value: Any) -> Any:
    return [value] if isinstance(value, (str, datetime.date)) else value


Day = Annotated[str, BeforeValidator(_day)]
Days = Annotated[list[Day], BeforeValidator(_as_days)]


class Build(Strict):
    """How request shards are made and written.

    ``buckets``: user shards of each day, one grouping task each; default from the day's size, so that files come
    to about ``file_bytes`` (compressed). ``bucket_bytes``: rows in memory that are grouped at once; a build's
    memory is a few times that, for each CPU. ``row_group_requests``, ``row_group_impressions``,
    ``row_group_bytes`` (in memory): a row group, the unit of reading, ends at whichever comes first; a single
    larger request has one of its own. ``order`` of the rows of a file: ``user_time`` (compresses best) or
    ``time``. ``staging_compression`` of the files between the stages: ``auto`` is none on local disks, lz4 on object
    stores. ``keep_aside``: write the rows that join to no request under ``aside/`` (they are counted either
    way). ``days``: build only these UTC days (``YYYY-MM-DD``), from all their rows in the source; the other days are
    those of the version before; empty: build all days. ``check_other_days``: whether a request key of the days that
    are built may not be in the other days either, whose keys are read for that. ``ledger``: whether the sizes of the
    impression-level form sorted by request are measured on all rows (``full``), on a sample of the shards (``sample``)
    or not (``off``).
    ``orphan_hours``: on object stores a build removes files older than that which no version names (a killed build
    left them) and that are not of a build at work. Locally they go at once.

    What happens where a check fails (docs/data.md); all is counted in the manifest and its report:
    ``on_request_conflict``: a request-only column varies within a request: ``fail``, or keep the ``first`` /
    ``last`` value in impression order, or that of the impression with the latest ``keys.impression_time``
    (``max_time``). ``on_duplicate_impression``: ``fail``, or ``drop`` all but the first. ``on_leaking_history``:
    history events at or after the request's time: ``fail``, ``count`` (they stay in the shards and never reach
    a model) or ``drop`` them. ``max_empty_history_share``: more empty histories than this share fail.
    """

    buckets: int | None = Field(default=None, gt=0)
    bucket_bytes: int = Field(default=128_000_000, gt=0)
    file_bytes: int = Field(default=64_000_000, gt=0)
    row_group_requests: int = Field(default=1024, gt=0)
    row_group_impressions: int = Field(default=65_536, gt=0)
    row_group_bytes: int = Field(default=64_000_000, gt=0)
    order: Literal["user_time", "time"] = "user_time"
    compression_level: int = Field(default=3, ge=1, le=22)
    staging_compression: Literal["auto", "none", "lz4", "zstd"] = "auto"
    keep_aside: bool = True
    days: Days = Field(default_factory=list)
    check_other_days: bool = True
    on_request_conflict: Literal["fail", "first", "last", "max_time"] = "fail"
    on_duplicate_impression: Literal["fail", "drop"] = "fail"
    on_leaking_history: Literal["fail", "count", "drop"] = "fail"
    max_empty_history_share: float = Field(default=0.99, ge=0, le=1)
    ledger: Literal["full", "sample", "off"] = "sample"
    orphan_hours: float = Field(default=168.0, gt=0)


class Holdout(Strict):
    """What is held out for evaluation: the last ``days`` days of the data; with ``by: request``, a ``fraction`` of
    the requests chosen by a hash of the request key; with ``by: all``, all of it, for evaluating a model on a data
    set that it was not trained on. ``only_days``: of the data, only these UTC days; empty: all."""

    by: Literal["day", "request", "all"] = "day"
    days: int = Field(default=1, gt=0)
    fraction: float = Field(default=0.1, gt=0, lt=1)
    only_days: Days = Field(default_factory=list)


class Ingest(Strict):
    """The order and size of batches (docs/ingest.md).

    ``lanes``: virtual workers, fixed for a run; ranks own lanes, so results do not depend on their number. 12 are
    shared evenly by 1, 2, 3, 4, 6 and 12 workers.
    ``mode``: ``shuffled``, or ``time`` for data that must be trained on in the order of time.
    ``batch_impressions``, ``batch_cost``: what one lane's batch of a step is filled up to, at least one of them;
    the cost of a request is a polynomial of its history tokens and impressions that the model publishes.
    ``oversize``: what becomes of a single request above that: a batch of its ``own``, or it is ``split`` into
    requests with the same user side (never in evaluation).
    ``interleave``: at most so many requests of a user in a batch, as far as a window allows; violations are
    counted. ``window_units``: row groups shuffled together.
    ``drop_last``: end an epoch as soon as one lane has no more data (what is left is dropped, and counted).
    ``on_bad_shard``: a missing or damaged file is an error (``fail``), or skipped and counted (``skip``).
    ``reader``: ``ray_data`` (tasks on data nodes) or ``thread`` (a background thread of the trainer); both
    deliver the identical stream. ``prefetch_batches``: batches that a lane has ready.
    """

    lanes: int = Field(default=12, gt=0)
    mode: Literal["shuffled", "time"] = "shuffled"
    batch_impressions: int | None = Field(default=256, gt=0)
    batch_cost: float | None = Field(default=None, gt=0)
    oversize: Literal["own", "split"] = "own"
    interleave: int | None = Field(default=None, gt=0)
    window_units: int = Field(default=4, gt=0)
    drop_last: bool = False
    on_bad_shard: Literal["fail", "skip"] = "fail"
    reader: Literal["ray_data", "thread"] = "ray_data"
    prefetch_batches: int = Field(default=4, gt=0)

    @model_validator(mode="after")
    def _some_budget(self) -> Ingest:
        if self.batch_impressions is None and self.batch_cost is None:
            raise ValueError("a batch needs a budget: give batch_impressions, batch_cost or both")
        return self

"""The stages of a build, each a function that any node can run by itself.

``deal`` and ``assemble`` bring the logs of a joined source together; ``count`` reads the key columns, from which
the exchange is planned; ``scatter`` deals the rows of a unit to buckets of (day, user); ``gather`` groups the
buckets of one shard into requests, checks them and writes their files; ``verify`` looks for request keys that
more than one bucket holds. Between them lie staging files (``staging``). All rows of a request meet in one
bucket; memory is that of a few buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.config import Build
from roo_ray.errors import DataError, RooError
from roo_ray.requests.copies import Dealt, SharedCopies
from roo_ray.requests.examine import examine_requests
from roo_ray.requests.exchange import Exchange, Shard, Survey, add_surveys, survey_rows
from roo_ray.requests.grouping import NUM_IMPRESSIONS, group_parts, require_keys
from roo_ray.requests.ledger import Sizes, add_sizes, measure_bucket
from roo_ray.requests.manifest import ShardFile
from roo_ray.requests.report import FAIL, Finding, merge_findings, stops_writing
from roo_ray.requests.shards import WriteOptions, write_options, write_shards, write_whole
from roo_ray.requests.staging import BATCH_ROWS, Codec, Piece, Runs, StagingWriter, read_pieces, read_staged
from roo_ray.requests.two_days import NO_TWO_DAYS, TwoDays, stage_days
from roo_ray.requests.uniqueness import ranges_for, stage_hashes
from roo_ray.schema import Schema
from roo_ray.sources.base import JoinedSource, KeyedSource, ReadUnit, RowKind, Source
from roo_ray.sources.columns import as_array, list_parts
from roo_ray.sources.compare import Ints
from roo_ray.sources.hashing import Hashes, hash_array, hash_rows
from roo_ray.sources.times import epoch_seconds, utc_days
from roo_ray.storage import open_filesystem

COPY_OF = "_copy_of"
ACCUMULATED = 2  # buckets' worth of request rows that are written together
SHARED_BUCKETS = 3  # buckets' worth of copies in which a task finds those that it has staged
LEAST_TASKS, TASK_BYTES = 4, 1_000_000_000  # of the log in memory that one task deals
ASIDE = "aside"
REFUSED = "REFUSED"


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


@dataclass(frozen=True)
class Assembly:
    """What one bucket of a joined source gave. ``read``: rows of each log; ``aside``: reason -> rows and file."""

    joined: Joined | None
    read: dict[str, int]
    counts: dict[str, int]
    aside: dict[str, tuple[int, str | None]]


@dataclass(frozen=True)
class Scattered:
    """What one unit gave: rows read, and where they lie in staging (``impressions`` beside the copies of the
    request-level columns, unless rows are whole requests)."""

    rows: int
    impressions: int
    copies_runs: Runs
    impression_runs: Runs | None


@dataclass(frozen=True)
class Gathered:
    """What one shard gave: ``rows`` read from staging, the files written, what the checks found, the ledger's
    sizes, and where the hashes of its request keys lie."""

    rows: int
    files: list[ShardFile] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    sizes: Sizes = field(default_factory=dict)
    keys: Runs | None = None


def key_hashes(table: pa.Table, schema: Schema) -> tuple[Ints, Hashes, Hashes]:
    """(rows,) each: the UTC day, the user's hash and the hash of the request key."""
    require_keys(table, schema)
    days = utc_days(epoch_seconds(table.column(schema.keys.time), schema.keys.time))
    return days, hash_array(table.column(schema.keys.user)), hash_rows(table, schema.keys.request)


def key_columns(schema: Schema) -> list[str]:
    """The columns that decide where a row goes."""
    return list(dict.fromkeys([*schema.keys.request, schema.keys.user, schema.keys.time]))


# ---- logs that are joined ------------------------------------------------------------------------


def deal(plan: BuildPlan, unit: ReadUnit, buckets: int) -> Runs:
    """Deals the rows of a unit of one log to buckets by the log's keys. Raises DataError for null keys."""
    assert isinstance(plan.source, JoinedSource)
    log = plan.source.logs[unit.log]
    with StagingWriter(plan.staging, f"log-{unit.index:06d}.arrow", log.schema, plan.codec) as writer:
        for table in plan.source.batches(unit):
            for name in log.keys:
                if table.column(name).null_count:
                    raise DataError(
                        f"{unit.path}: column '{name}' is null in {table.column(name).null_count} rows; rows of the "
                        "logs are joined by it: remove these rows or correct the source"
                    )
            bucket = (hash_rows(table, log.keys) % np.uint64(buckets)).astype(np.int64)
            order = np.argsort(bucket, kind="stable")
            bounds = np.searchsorted(bucket[order], np.arange(buckets + 1))
            writer.write_sorted(table.take(pa.array(order)), np.arange(buckets), bounds)
        return writer.runs


def assemble(plan: BuildPlan, bucket: int, pieces: dict[str, list[Piece]]) -> Assembly:
    """Joins the rows of one bucket of all logs, stages the result and writes what is kept aside."""
    assert isinstance(plan.source, JoinedSource)
    parts = {
        name: pa.Table.from_batches(read_pieces(plan.staging, pieces.get(name, [])), log.schema)
        for name, log in plan.source.logs.items()
    }
    read = {name: part.num_rows for name, part in parts.items()}
    result = plan.source.assemble(parts)
    del parts
    aside = {reason: _write_aside(plan, reason, bucket, rows) for reason, rows in result.aside.items() if rows.num_rows}
    if not result.rows.num_rows:
        return Assembly(None, read, result.counts, aside)
    if not result.rows.schema.equals(plan.source.row_schema):
        raise RooError(f"a joined source gave rows of {result.rows.schema}, not of {plan.source.row_schema}")
    name = f"joined-{bucket:06d}.arrow"
    surveys = []
    with StagingWriter(plan.staging, name, plan.source.row_schema, plan.codec) as writer:
        for at in range(0, result.rows.num_rows, BATCH_ROWS):
            part = result.rows.slice(at, BATCH_ROWS)
            writer.write(part, 0)
            surveys.append(survey_rows(*key_hashes(part, plan.schema), part.nbytes))
    return Assembly(Joined(name, add_surveys(surveys)), read, result.counts, aside)


def _write_aside(plan: BuildPlan, reason: str, bucket: int, rows: pa.Table) -> tuple[int, str | None]:
    if not plan.build.keep_aside:
        return rows.num_rows, None
    filesystem, base = open_filesystem(plan.data_set)
    path = f"{aside_folder(plan.version, plan.token)}/{reason}/part-{bucket:05d}.parquet"
    stream = pa.BufferOutputStream()
    pq.write_table(rows, stream, compression="zstd", compression_level=plan.build.compression_level)
    write_whole(filesystem, f"{base}/{path}", stream.getvalue())
    return rows.num_rows, path


def aside_folder(version: int, token: str = "") -> str:
    """``aside/v000001``: where the rows that a version keeps aside lie in its data set."""
    return f"{ASIDE}/v{version:06d}-{token}" if token else f"{ASIDE}/v{version:06d}"


# ---- count and scatter ---------------------------------------------------------------------------


def count(plan: BuildPlan, unit: ReadUnit, ranges: int) -> tuple[Survey, Runs | None]:
    """The survey of a unit of a plain source, and where the days of its requests are staged, in ``ranges``, if they
    may have to be settled; reads only the key columns where the source can."""
    source, columns = plan.source, key_columns(plan.schema)
    tables = source.key_batches(unit, columns) if isinstance(source, KeyedSource) else source.batches(unit)
    surveys, key_days = [], []
    for table in tables:
        days, users, requests = key_hashes(table, plan.schema)
        surveys.append(survey_rows(days, users, requests, 0))
        if plan.settles_days:
            key_days.append((requests, days))
    runs = stage_days(plan.staging, unit.index, key_days, ranges) if plan.settles_days else None
    return replace(add_surveys(surveys), bytes=unit.bytes), runs


def _batches_of(plan: BuildPlan, unit: ReadUnit | Joined) -> Iterator[pa.Table]:
    if isinstance(unit, Joined):
        return (pa.Table.from_batches([batch]) for batch in read_staged(plan.staging, unit.name))
    return plan.source.batches(unit)


def _rows_of(plan: BuildPlan, units: Sequence[ReadUnit | Joined]) -> Iterator[pa.Table]:
    """The units' rows of the days that are built, and those of requests whose day is to be settled."""
    for table in (table for unit in units for table in _batches_of(plan, unit)):
        if plan.days:
            require_keys(table, plan.schema)
            days = utc_days(epoch_seconds(table.column(plan.schema.keys.time), plan.schema.keys.time))
            wanted = np.isin(days, plan.days)
            if plan.two_days.buckets:
                wanted |= plan.two_days.holds(hash_rows(table, plan.schema.keys.request))
            table = table.filter(pa.array(wanted))
        if table.num_rows:
            yield table


def scatter(plan: BuildPlan, units: Sequence[ReadUnit | Joined], number: int) -> Scattered:
    """Deals the rows of some units to the exchange's buckets. Impressions of one request share a copy of the
    request-level columns (``copies``). Raises DataError for a file that cannot be read and null keys."""
    exchange, schema, types = plan.exchange, plan.schema, plan.source.row_schema
    assert exchange is not None
    rows = impressions = 0
    if plan.kind == "requests":
        with StagingWriter(plan.staging, f"rows-{number:06d}.arrow", types, plan.codec) as writer:
            for table in _rows_of(plan, units):
                dealt = _dealt(plan, *key_hashes(table, schema))
                writer.write_sorted(table.take(pa.array(dealt.order)), *parts_of(dealt.buckets))
                rows += table.num_rows
                impressions += int(list_parts(as_array(table.column(schema.impression_columns[0])))[0].sum())
            return Scattered(rows, impressions, writer.runs, None)
    shared = SharedCopies(schema, exchange.buckets + plan.two_days.buckets, SHARED_BUCKETS * plan.build.bucket_bytes)
    with (
        StagingWriter(plan.staging, f"copies-{number:06d}.arrow", plan.copy_types, plan.codec) as copies,
        StagingWriter(plan.staging, f"impressions-{number:06d}.arrow", plan.own_types, plan.codec) as own,
    ):
        for table in _rows_of(plan, units):
            dealt = _dealt(plan, *key_hashes(table, schema))
            keeps, copy, kept = shared.share(table.select(schema.request_columns), dealt)
            copies.write_sorted(kept, *parts_of(dealt.buckets[keeps]))
            rest = table.select(schema.impression_columns).take(pa.array(dealt.order))
            own.write_sorted(rest.append_column(COPY_OF, [copy.astype(np.int32)]), *parts_of(dealt.buckets))
            rows += table.num_rows
        return Scattered(rows, rows, copies.runs, own.runs)


def scatter_tasks(inputs: Sequence[ReadUnit | Joined], kind: RowKind) -> list[list[ReadUnit | Joined]]:
    """Which units one task deals. Impressions of neighbouring units go together, so that fewer copies of their
    request-level columns travel; memory does not grow by that, for a task reads batch after batch."""
    tasks: list[list[ReadUnit | Joined]] = []
    most = min(sum(unit.bytes for unit in inputs if isinstance(unit, ReadUnit)) / LEAST_TASKS, TASK_BYTES)
    room = 0.0
    for unit in inputs:
        size = 0 if isinstance(unit, Joined) else unit.bytes
        alone = not size or kind == "requests"  # joined, or not an impression each: nothing repeats
        if not tasks or alone or size / 2 > room:
            tasks.append([])
            room = most
        tasks[-1].append(unit)
        room -= size
    return tasks


def _dealt(plan: BuildPlan, days: Ints, users: Hashes, requests: Hashes) -> Dealt:
    assert plan.exchange is not None
    bucket = plan.two_days.bucket_of(plan.exchange, days, users, requests)
    order = np.lexsort([requests, bucket])
    return Dealt(order, bucket[order], requests[order])


def parts_of(buckets: Ints) -> tuple[Ints, Ints]:
    """(parts,) the values of ``buckets``, which is sorted, and (parts + 1,) where each begins and the end."""
    starts = np.flatnonzero(np.append(True, buckets[1:] != buckets[:-1])[: len(buckets)])
    return buckets[starts], np.append(starts, len(buckets))


# ---- gather --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardTask:
    """A shard to gather: for each of its buckets, the pieces of the copies (or of the whole requests) and of the
    impressions."""

    shard: Shard
    index: int
    copies: list[list[Piece]]
    impressions: list[list[Piece]] | None


def gather(plan: BuildPlan, task: ShardTask) -> Gathered:
    """Groups, checks and writes a shard; nothing more is written once a check has failed."""
    result = Gathered(0)
    rows = size = 0
    waiting: list[pa.Table] = []
    hashes: list[Hashes] = []
    for number in range(len(task.copies)):
        requests, taken, findings = _grouped(plan, task, number)
        rows += taken
        size += requests.nbytes
        waiting.append(requests)
        hashes.append(hash_rows(requests, plan.schema.keys.request))
        result = replace(result, findings=merge_findings([result.findings, findings]))
        if size > ACCUMULATED * plan.build.bucket_bytes or number + 1 == len(task.copies):
            together = pa.concat_tables(waiting).combine_chunks()
            waiting, size = [], 0
            if together.num_rows:
                result = _write(plan, task, together, result)
            del together
    keys = stage_hashes(plan.staging, task.index, np.concatenate(hashes), plan.key_ranges)
    return replace(result, rows=rows, keys=keys)


def _grouped(plan: BuildPlan, task: ShardTask, number: int) -> tuple[pa.Table, int, list[Finding]]:
    """(request rows, rows read, what was found of keys and conflicts) of one bucket."""
    types = plan.source.row_schema
    if task.impressions is None:
        table = pa.Table.from_batches(read_pieces(plan.staging, task.copies[number]), types)
        lengths, _ = list_parts(as_array(table.column(plan.schema.impression_columns[0])))
        requests = table.append_column(NUM_IMPRESSIONS, pa.array(lengths.astype(np.int32)))
        keys_known = Finding("null request key", ", ".join(plan.schema.keys.request), len(lengths), "requests", 0, FAIL)
        return requests.select([*plan.schema.columns, NUM_IMPRESSIONS]), table.num_rows, [keys_known]
    shared, rest, copy_of = read_bucket(plan, task.copies[number], task.impressions[number])
    requests, findings = group_parts(shared, rest, copy_of, plan.schema, plan.build.on_request_conflict)
    return requests, rest.num_rows, findings


def read_bucket(
    plan: BuildPlan, copies_pieces: Sequence[Piece], impression_pieces: Sequence[Piece]
) -> tuple[pa.Table, pa.Table, Ints]:
    """The staged rows of one bucket: the copies of the request-level columns, the impressions, and (impressions,)
    the copy of each."""
    copies: list[pa.RecordBatch] = []
    own: list[pa.RecordBatch] = []
    copy_of = [np.zeros(0, np.int64)]
    before = 0
    for copies_piece, own_piece in zip(copies_pieces, impression_pieces, strict=True):
        its = list(read_pieces(plan.staging, [own_piece]))  # numbered within the copies of the same task
        copy_of += [np.asarray(batch.column(COPY_OF)).astype(np.int64) + before for batch in its]
        more = list(read_pieces(plan.staging, [copies_piece]))
        before += sum(batch.num_rows for batch in more)
        own, copies = own + its, copies + more
    shared = pa.Table.from_batches(copies, plan.copy_types).combine_chunks()
    rest = pa.Table.from_batches(own, plan.own_types).drop_columns([COPY_OF]).combine_chunks()
    return shared, rest, np.concatenate(copy_of)


def _write(plan: BuildPlan, task: ShardTask, requests: pa.Table, so_far: Gathered) -> Gathered:
    """Checks, measures and writes request rows of a shard."""
    requests, found = examine_requests(requests, plan.schema, plan.build)
    findings = merge_findings([so_far.findings, found])
    if _refused(plan, findings):
        return replace(so_far, findings=findings)
    assert plan.exchange is not None
    shards = len(plan.exchange.shards)
    sizes = measure_bucket(requests, plan.schema, plan.options, plan.build.ledger, task.index, shards)
    files = list(so_far.files)
    written = write_shards(
        requests, plan.schema, plan.options, plan.data_set, plan.version, task.shard.number, plan.token, len(files)
    )
    for file, column_bytes in written:
        files.append(file)
        for name, size in column_bytes.items():
            sizes[name]["disk_bytes"]["request"] += size
    return replace(so_far, files=files, findings=findings, sizes=add_sizes([so_far.sizes, sizes]))


def _refused(plan: BuildPlan, findings: list[Finding]) -> bool:
    """Whether a check failed here or in another task: what is left is then examined and not written."""
    filesystem, staging = open_filesystem(plan.staging)
    if stops_writing(findings):
        filesystem.open_output_stream(f"{staging}/{REFUSED}").close()
        return True
    return bool(filesystem.get_file_info(f"{staging}/{REFUSED}").type != pafs.FileType.NotFound)


def readable_failure(error: Exception, what: str) -> RooError:
    """The error for the user: roo_ray's own as they are; others named with the step that failed."""
    if isinstance(error, RooError):
        return error
    if isinstance(error, (pa.ArrowException, OSError)):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return DataError(f"{what} failed: {reason}")
    return RooError(f"{what} failed: {type(error).__name__}: {error}")

"""The stages of a build, each a function that any node can run by itself.

``count`` reads the key columns, from which the exchange is planned; ``scatter`` deals the rows of some units to
buckets of (day, user); ``gather`` groups the buckets of one shard into requests, checks them and writes their files.
Between them lie staging files (``staging``). All rows of a request meet in one bucket; memory is that of a few
buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from roo_ray.errors import DataError, RooError, StorageError
from roo_ray.requests.copies import Dealt, SharedCopies
from roo_ray.requests.examine import examine_requests
from roo_ray.requests.exchange import Shard, Survey, add_surveys, survey_rows
from roo_ray.requests.grouping import NUM_IMPRESSIONS, group_parts, require_keys
from roo_ray.requests.ledger import Sizes, add_sizes, measure_bucket
from roo_ray.requests.manifest import ShardFile
from roo_ray.requests.plan import COPY_OF, BuildPlan, Joined, key_columns, key_hashes
from roo_ray.requests.report import FAIL, Finding, merge_findings, stops_writing
from roo_ray.requests.shards import write_shards
from roo_ray.requests.staging import Piece, Runs, StagingWriter, read_pieces, read_staged
from roo_ray.requests.two_days import stage_days
from roo_ray.requests.uniqueness import stage_hashes
from roo_ray.sources.base import KeyedSource, ReadUnit, RowKind
from roo_ray.sources.columns import as_array, list_parts, take_table
from roo_ray.sources.compare import Ints
from roo_ray.sources.hashing import Hashes, hash_rows
from roo_ray.sources.times import epoch_seconds, utc_days
from roo_ray.storage import open_filesystem

ACCUMULATED = 2  # buckets' worth of request rows that are written together
SHARED_BUCKETS = 3  # buckets' worth of copies in which a task finds those that it has staged
LEAST_TASKS, TASK_BYTES = 4, 1_000_000_000  # of the log in memory that one task deals
REFUSED = "REFUSED"


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
                writer.write_sorted(take_table(table, dealt.order), *parts_of(dealt.buckets))
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
            rest = take_table(table.select(schema.impression_columns), dealt.order)
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
    """The error for the user: roo_ray's own as they are; others named with the step that failed. What is not there or
    not permitted, and data that Arrow refuses, are bad input; a full disk or a lost connection is none."""
    if isinstance(error, RooError):
        return error
    if isinstance(error, (pa.ArrowException, OSError)):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        ours = getattr(error, "errno", None) is None or isinstance(error, (FileNotFoundError, PermissionError))
        return (DataError if ours else StorageError)(f"{what} failed: {reason}")
    return RooError(f"{what} failed: {type(error).__name__}: {error}")

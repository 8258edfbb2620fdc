"""Settles requests with times on several UTC days (``two_days``): all rows of each go to the one day that
``build.on_request_conflict`` decides for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.requests.grouping import OnConflict, describe_key, kept_row
from roo_ray.requests.plan import COPY_OF, BuildPlan, key_hashes
from roo_ray.requests.report import Finding
from roo_ray.requests.stages import Gathered, Scattered, parts_of, read_bucket
from roo_ray.requests.staging import Piece, Runs, StagingWriter, pieces_of
from roo_ray.requests.tasks import Say, run_tasks
from roo_ray.schema import Schema
from roo_ray.sources.columns import take_table
from roo_ray.sources.compare import Ints, Mask
from roo_ray.sources.times import day_name

TWO_DAYS = "request with times on two days"


@dataclass(frozen=True)
class Settled:
    """What settling some requests with several days gave: how many there are and one of them, rows of other days
    than the plan's, which are left out, and where the others lie in staging."""

    requests: int
    first: str
    rows_outside: int
    copies_runs: Runs
    impression_runs: Runs


def settle_days(plan: BuildPlan, scattered: Sequence[Scattered], progress: Say) -> list[Settled]:
    """Deals the rows of requests with several days on to the buckets of one day."""
    assert plan.exchange is not None
    first, last = plan.exchange.buckets, plan.exchange.buckets + plan.two_days.buckets
    if first == last:
        return []
    progress(f"settling {len(plan.two_days.hashes):,} requests with times on several days")
    copies = pieces_of([part.copies_runs for part in scattered], last)
    own = pieces_of([part.impression_runs for part in scattered if part.impression_runs is not None], last)
    tasks = [(copies[bucket], own[bucket], bucket) for bucket in range(first, last) if copies[bucket]]
    return run_tasks(plan, "settling", settle, tasks, progress)


def settled_finding(plan: BuildPlan, gathered: Sequence[Gathered], settled: Sequence[Settled]) -> list[Finding]:
    """The finding that requests with several days were settled by the rule; none where there were none."""
    found = sum(part.requests for part in settled)
    if not found:
        return []
    requests = sum(file.requests for part in gathered for file in part.files)
    first = next(part.first for part in settled if part.first)
    rule = plan.build.on_request_conflict
    return [Finding(TWO_DAYS, plan.schema.keys.time, requests, "requests", found, rule, first)]


def settle(plan: BuildPlan, copies: list[Piece], impressions: list[Piece], number: int) -> Settled:
    """Decides the day of the requests in one bucket of those with several, and deals their rows to the buckets of
    that day; the copies of the request-level columns go along as they are, for the conflict is found and counted
    where the rows are grouped. Raises DataError where a request has days inside and outside ``plan.days``."""
    assert plan.exchange is not None
    schema = plan.schema
    shared, rest, copy_of = read_bucket(plan, copies, impressions)
    of_copies = key_hashes(shared, schema)
    days, users, requests = of_copies[0][copy_of], of_copies[1][copy_of], of_copies[2][copy_of]
    rule = plan.build.on_request_conflict
    found = settle_rows(shared, rest, copy_of, days, schema, rule, plan.days)
    rows = np.flatnonzero(found.taken)
    owner = found.owner[rows]
    bucket = plan.exchange.bucket_of(days[owner], users[owner], requests[rows])
    order = np.lexsort([copy_of[rows], bucket])  # all impressions of a copy are of one request, so of one bucket
    bucket, rows = bucket[order], rows[order]
    new = np.append(True, (bucket[1:] != bucket[:-1]) | (copy_of[rows][1:] != copy_of[rows][:-1]))[: len(rows)]
    parts = parts_of(bucket)
    number_of = np.cumsum(new) - 1  # (rows,) among all copies; then within those of the bucket
    number_of -= np.repeat(number_of[parts[1][:-1]], np.diff(parts[1]))
    with (
        StagingWriter(plan.staging, f"settled-copies-{number:06d}.arrow", plan.copy_types, plan.codec) as copies_writer,
        StagingWriter(plan.staging, f"settled-impressions-{number:06d}.arrow", plan.own_types, plan.codec) as own,
    ):
        copies_writer.write_sorted(take_table(shared, copy_of[rows][new]), *parts_of(bucket[new]))
        own.write_sorted(take_table(rest, rows).append_column(COPY_OF, [number_of.astype(np.int32)]), *parts)
        return Settled(found.requests, found.first, len(found.taken) - len(rows), copies_writer.runs, own.runs)


@dataclass(frozen=True)
class Settlement:
    """Where the rows of some requests go. ``owner``: (rows,) the row whose request-level values its request keeps;
    ``taken``: (rows,) whether the request's day is built; ``requests``: how many had several days; ``first``: one of
    them, as text."""

    owner: Ints
    taken: Mask
    requests: int
    first: str


def settle_rows(
    copies: pa.Table,
    impressions: pa.Table,
    copy_of: Ints,
    days: Ints,
    schema: Schema,
    rule: OnConflict,
    built: Sequence[int],
) -> Settlement:
    """Settles the requests of some impressions by ``rule``; ``copy_of`` as in ``grouping.group_parts``, ``days``:
    (rows,) UTC days.

    Raises DataError where a request has times both on a ``built`` day and on another one: it would have to leave
    the one and join the other.
    """
    request, owner = kept_row(copies, impressions, copy_of, schema, rule)
    several = np.zeros(int(request.max(initial=-1)) + 1, np.bool_)
    several[request[days != days[owner]]] = True
    inside = np.isin(days, np.asarray(built)) if len(built) else np.ones(len(days), np.bool_)
    astride = np.flatnonzero(inside != inside[owner])
    if len(astride):
        row = int(astride[0])
        pair = sorted([int(days[row]), int(days[owner[row]])])
        raise DataError(
            f"request {describe_key(copies, int(copy_of[row]), schema.keys.request)} has times on "
            f"{day_name(pair[0])} and {day_name(pair[1])}, of which build.days names one: with "
            f"build.on_request_conflict={rule} both are decided together; add the other day to build.days"
        )
    at = np.flatnonzero(several[request] & inside)
    first = describe_key(copies, int(copy_of[at[0]]), schema.keys.request) if len(at) else ""
    return Settlement(owner, inside, len(np.unique(request[at])), first)

"""The accounts of a data set by UTC day, so that a version can carry over the days that it does not touch.

Whatever adds up over requests is kept per day: what the checks counted, and what the ledger measures. The totals
in a manifest (``counts``, ``ledger``) are made of them. Bytes as logged are known for the source as a whole; a day
has its share of them by impressions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roo_ray.requests.ledger import add_sizes, build_ledger
from roo_ray.requests.manifest import DayAccount, ShardFile
from roo_ray.schema import Schema

Accounts = dict[str, DayAccount]


def add_counts(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts, name by name."""
    total: dict[str, int] = {}
    for part in parts:
        for name, number in part.items():
            total[name] = total.get(name, 0) + number
    return total


def impressions_by_day(files: Iterable[ShardFile]) -> dict[str, int]:
    """Impressions of each UTC day."""
    return add_counts({file.day: file.impressions} for file in files)


def share(logged: Mapping[str, int], part: int, whole: int) -> dict[str, int]:
    """``part / whole`` of the bytes of each column."""
    return {name: round(size * part / max(whole, 1)) for name, size in logged.items()}


def day_accounts(
    parts: Iterable[tuple[str, Mapping[str, int], Mapping[str, Mapping[str, Mapping[str, int]]]]],
    files: Iterable[ShardFile],
    logged: Mapping[str, int] | None,
    read: int,
) -> Accounts:
    """The accounts of what a build wrote. ``parts``: (day, counts, sizes) of each of its tasks; ``logged``: compressed
    bytes per column of all the impressions of the source, ``read``, if it is an impression log."""
    gathered: dict[str, list[tuple[Any, Any]]] = {}
    for day, counts, sizes in parts:
        gathered.setdefault(day, []).append((counts, sizes))
    impressions = impressions_by_day(files)
    accounts = {}
    done = 0
    for day, some in sorted(gathered.items()):
        # differences of running shares: over all impressions they add up to the whole, to the byte
        upto = done + impressions.get(day, 0)
        accounts[day] = DayAccount(
            counts=add_counts(counts for counts, _ in some),
            sizes=add_sizes(sizes for _, sizes in some),
            logged=None if logged is None else _difference(share(logged, upto, read), share(logged, done, read)),
        )
        done = upto
    return accounts


def _difference(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {name: size - right[name] for name, size in left.items()}


def without(
    account: DayAccount, counts: Mapping[str, int], sizes: Mapping[str, Any], before: int, after: int
) -> DayAccount:
    """An account less the counts and sizes of requests that are removed from its day, which had ``before`` impressions
    and has ``after``; its bytes as logged shrink in proportion. A kind that the account did not measure stays out of
    it."""
    minus = {
        column: {
            kind: {level: -value for level, value in levels.items()}
            for kind, levels in kinds.items()
            if kind in account.sizes.get(column, {})
        }
        for column, kinds in sizes.items()
    }
    return DayAccount(
        counts=add_counts([account.counts, {name: -number for name, number in counts.items()}]),
        sizes=add_sizes([account.sizes, minus]),
        logged=None if account.logged is None else share(account.logged, after, before),
    )


def total_counts(accounts: Accounts, files: Iterable[ShardFile]) -> dict[str, int]:
    """What is true of all days together: the checks' counts, requests and impressions."""
    files = list(files)
    return add_counts(account.counts for account in accounts.values()) | {
        "requests": sum(file.requests for file in files),
        "impressions": sum(file.impressions for file in files),
    }


def total_ledger(
    accounts: Accounts, schema: Schema, files: Sequence[ShardFile], codec: str, level: int
) -> dict[str, Any]:
    """The ledger of all days together. ``codec`` of the source's files, ``level`` of the shards' compression."""
    if not accounts:
        return {}
    logged = None
    if all(account.logged is not None for account in accounts.values()):
        logged = add_counts(account.logged or {} for account in accounts.values())
    return build_ledger(schema, [account.sizes for account in accounts.values()], files, logged, codec, level)

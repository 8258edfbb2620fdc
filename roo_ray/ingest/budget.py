"""Batches by budget: which requests of a window go into which batch. NumPy alone, nothing runs per request.

A batch is filled in order up to each budget: a number of impressions, a cost, or both. The cost of a request is
a polynomial of its history tokens t and impressions n with the coefficients that a model publishes. A request
above a budget is a batch of its own, or is split into requests with the same user side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roo_ray.sources.hashing import mix64

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Load = tuple[npt.NDArray[np.int64] | Floats, float]
"""The sizes of requests (B,) and what those of a batch may sum to."""

IMPRESSION_COST = (0.0, 0.0, 0.0, 1.0, 0.0)
"""The cost of a request where no model publishes one: its impressions."""


@dataclass(frozen=True)
class RequestCosts:
    """The cost of requests as a function of their impressions: ``fixed + slope * n``, both (B,) float64."""

    fixed: Floats
    slope: Floats

    @staticmethod
    def of(coefficients: Sequence[float], tokens: Integers, squares: Integers) -> RequestCosts:
        """``coefficients``: of 1, t, t squared, n and n t. ``tokens`` (B,): history events of each request, of
        all its sequences; ``squares`` (B,): the sum over sequences of their squared lengths."""
        one, t, tt, n, nt = (float(c) for c in coefficients)
        fixed: Floats = one + t * tokens.astype(np.float64) + tt * squares.astype(np.float64)
        return RequestCosts(fixed, n + nt * tokens.astype(np.float64))

    def take(self, requests: Integers) -> RequestCosts:
        """The costs of some requests."""
        return RequestCosts(self.fixed[requests], self.slope[requests])

    def at(self, counts: Integers) -> Floats:
        """(B,) float64: the cost of requests with ``counts`` impressions."""
        return self.fixed + self.slope * counts


@dataclass(frozen=True)
class Parts:
    """Requests, some of them split. All (P,) int64. ``request``: which request it is of; ``first``: its first
    impression in that request; ``counts``: its impressions; ``mark``: 0 a whole request, 1 the first part of a
    split one, 2 a later part."""

    request: Integers
    first: Integers
    counts: Integers
    mark: Integers


def split_oversize(counts: Integers, costs: RequestCosts, impressions: int | None, cost: float | None) -> Parts:
    """Splits requests of ``counts`` (B,) impressions that are above a budget into the fewest parts of about equal
    size that are not. A request whose user side alone is above the cost budget gains nothing and stays whole
    (but for the budget of impressions)."""
    most = np.full(len(counts), impressions or np.iinfo(np.int64).max)
    if cost is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.floor((cost - costs.fixed) / costs.slope)
            # the division was rounded up, or down
            room = np.where(costs.fixed + costs.slope * room > cost, room - 1, room)
            room = np.where(costs.fixed + costs.slope * (room + 1) <= cost, room + 1, room)
        helps = np.isfinite(room) & (room >= 1) & (costs.at(counts) > cost)
        most = np.where(helps, np.minimum(most, np.where(helps, room, 1).astype(np.int64)), most)
    parts = -(-counts // most)
    size = -(-counts // parts)
    parts = -(-counts // size)
    request = np.repeat(np.arange(len(counts)), parts)
    number = np.arange(len(request)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = number * size[request]
    mark = np.where(parts[request] == 1, 0, np.where(number == 0, 1, 2))
    return Parts(request, first, np.minimum(size[request], counts[request] - first), mark)


def batch_bounds(loads: Sequence[Load], count: int) -> Integers:
    """(batches + 1,) int64: the first request of each batch, and the end, when ``count`` requests are packed in
    order up to every budget; one above a budget is a batch of its own."""
    ends = [(np.cumsum(sizes), budget) for sizes, budget in loads]
    bounds = [0]
    while bounds[-1] < count:
        start = bounds[-1]
        stops = [
            int(np.searchsorted(end, (end[start - 1] if start else 0) + budget, side="right")) for end, budget in ends
        ]
        bounds.append(max(min([count, *stops]), start + 1))
    return np.array(bounds, np.int64)


def _occurrence(values: npt.NDArray[np.int64]) -> Integers:
    """(N,) int64: how many equal values stand before each value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(values) else order
    lengths = np.diff(np.append(starts, len(values)))
    occurrence = np.empty(len(values), np.int64)
    occurrence[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return occurrence


def _spread(users: Integers) -> Integers:
    """(B,) int64: an order in which the requests of every user lie at equal distances."""
    occurrence = _occurrence(users)
    _, which, counts = np.unique(users, return_inverse=True, return_counts=True)
    shift = (mix64(users.view(np.uint64)) >> np.uint64(11)).astype(np.float64) / 2**53
    return np.argsort((occurrence + shift) / counts[which], kind="stable")


def interleave(users: Integers, loads: Sequence[Load], limit: int) -> tuple[Integers, Integers]:
    """(order (B,), bounds (batches + 1,)) with at most ``limit`` requests of a user in a batch as far as it goes:
    where the rest of a window is of too few users, batches are filled up with their requests all the same."""
    pool = _spread(users)
    taken: list[Integers] = []
    bounds, reach = [0], 64
    while len(pool):
        while True:
            head = pool[:reach]
            allowed = _occurrence(users[head]) < limit
            whole = reach >= len(pool)
            candidates = np.concatenate([np.flatnonzero(allowed), np.flatnonzero(~allowed) if whole else head[:0]])
            chosen = head[candidates]
            stops = [int(np.searchsorted(np.cumsum(s[chosen]), budget, side="right")) for s, budget in loads]
            fit = max(min([len(chosen), *stops]), 1)
            if fit < len(chosen) or whole:
                break
            reach *= 2
        taken.append(chosen[:fit])
        bounds.append(bounds[-1] + fit)
        stays = np.ones(len(pool), np.bool_)
        stays[candidates[:fit]] = False
        pool = pool[stays]
    return np.concatenate([np.zeros(0, np.int64), *taken]), np.array(bounds, np.int64)

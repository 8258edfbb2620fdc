"""Batches by budget, splitting and interleaving, against rules applied one request at a time."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from roo_ray.ingest.budget import IMPRESSION_COST, RequestCosts, batch_bounds, interleave, split_oversize
from roo_ray.ingest.diagnostics import negative_pairs, user_stats

counts_lists = st.lists(st.integers(1, 40), max_size=50)
# as models publish them, in MFLOP: no whole numbers, of very different sizes, some of them 0
coefficients_of_models = st.tuples(*[st.one_of(st.just(0.0), st.floats(1e-6, 300.0))] * 5)
cost_budgets = st.floats(0.01, 5e4)
ROUNDING = 1e-12  # a sum of floats, relative to the sum of a window


def costs_of(coefficients: tuple[float, ...], tokens: list[int]) -> RequestCosts:
    t = np.array(tokens, np.int64)
    return RequestCosts.of(coefficients, t, t * t)


@limits(max_examples=50, deadline=None)
@given(counts_lists, st.integers(1, 60), cost_budgets, coefficients_of_models, st.randoms())
def test_no_batch_is_over_any_budget_but_single_oversize_requests(
    counts, impressions, cost, coefficients, draw
) -> None:  # type: ignore[no-untyped-def]
    sizes = np.array(counts, np.int64)
    costs = costs_of(coefficients, [draw.randrange(12) for _ in counts]).at(sizes)
    loads = [(sizes, impressions), (costs, cost)]
    slack = ROUNDING * (costs.sum() + cost)
    bounds = batch_bounds(loads, len(counts)).tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(counts)
    for start, end in pairwise(bounds):
        assert end > start
        fits = sizes[start:end].sum() <= impressions and costs[start:end].sum() <= cost + slack
        assert fits or end - start == 1
        if end < len(counts):  # filled: the next request would not have fitted
            assert sizes[start : end + 1].sum() > impressions or costs[start : end + 1].sum() > cost - slack


@limits(max_examples=50, deadline=None)
@given(st.floats(1e-6, 300.0), st.floats(1e-6, 300.0), st.integers(1, 40))
def test_a_part_that_just_fits_is_not_cut_further(fixed: float, slope: float, fits: int) -> None:
    """A budget of exactly what so many impressions cost: twice as many are two parts, however floats are rounded."""
    costs = costs_of((fixed, 0.0, 0.0, slope, 0.0), [0])
    budget = float(costs.at(np.array([fits]))[0])
    parts = split_oversize(np.array([2 * fits]), costs, None, budget)
    assert parts.counts.tolist() == [fits, fits]


def test_the_cost_is_the_published_polynomial() -> None:
    costs = costs_of((7.0, 5.0, 3.0, 2.0, 11.0), [0, 4])
    assert costs.at(np.array([3, 6])).tolist() == [7 + 2 * 3, 7 + 5 * 4 + 3 * 16 + 2 * 6 + 11 * 6 * 4]
    assert costs_of(IMPRESSION_COST, [9]).at(np.array([4])).tolist() == [4]


@limits(max_examples=50, deadline=None)
@given(
    counts_lists,
    st.one_of(st.none(), st.integers(1, 30)),
    st.one_of(st.none(), cost_budgets),
    coefficients_of_models,
    st.randoms(),
)
def test_split_requests_keep_every_impression_once_and_fit(counts, impressions, cost, coefficients, draw) -> None:  # type: ignore[no-untyped-def]
    sizes = np.array(counts, np.int64)
    costs = costs_of(coefficients, [draw.randrange(6) for _ in counts])
    parts = split_oversize(sizes, costs, impressions, cost)
    for request, count in enumerate(counts):
        mine = parts.request == request
        seen = [i for f, n in zip(parts.first[mine], parts.counts[mine], strict=True) for i in range(f, f + n)]
        assert seen == list(range(count))
        marks = parts.mark[mine].tolist()
        assert marks == [0] if len(marks) == 1 else marks == [1] + [2] * (len(marks) - 1)
        fits = (impressions is None or count <= impressions) and (cost is None or costs.at(sizes)[request] <= cost)
        if fits:
            assert marks == [0]
    part_costs = costs.take(parts.request).at(parts.counts)
    one_fits = costs.at(np.ones(len(sizes), np.int64))[parts.request] <= (cost or np.inf)
    assert (part_costs[one_fits] <= (cost or np.inf)).all()
    assert (parts.counts <= (impressions or np.inf)).all()


@limits(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), max_size=60), st.integers(1, 3), st.integers(3, 20))
def test_interleaving_loses_nothing_and_crowds_only_where_users_run_out(requests, limit, budget) -> None:  # type: ignore[no-untyped-def]
    users = np.array([user for user, _ in requests], np.int64)
    sizes = np.array([size for _, size in requests], np.int64)
    order, bounds = interleave(users, [(sizes, budget)], limit)
    assert sorted(order.tolist()) == list(range(len(requests)))
    for start, end in pairwise(bounds.tolist()):
        batch, left = users[order[start:end]], users[order[end:]]
        assert sizes[order[start:end]].sum() <= budget or end - start == 1
        crowded = sum(max(n - limit, 0) for n in Counter(batch.tolist()).values())
        if crowded:  # every other request that was left is of a user who has his fill already
            taken = Counter(batch.tolist())
            assert all(taken[user] >= limit for user in left.tolist())
    beyond = user_stats(bounds, users[order], limit)[1] if len(users) else np.zeros(0)
    expected = [
        sum(max(n - limit, 0) for n in Counter(users[order[a:b]].tolist()).values())
        for a, b in pairwise(bounds.tolist())
    ]
    assert beyond.tolist() == expected


def test_interleaving_keeps_users_apart_where_it_can() -> None:
    users = np.repeat(np.arange(50), 20)  # sorted by user, as shards are
    order, bounds = interleave(users, [(np.ones(1000, np.int64), 50)], 1)
    assert len(bounds) == 21
    assert user_stats(bounds, users[order], 1)[1].sum() == 0
    assert user_stats(bounds, users, 1)[1].sum() > 900


@limits(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4), st.booleans()), max_size=40))
def test_false_negatives_are_counted_as_they_are_defined(pool: list[tuple[int, int, int, bool]]) -> None:
    pool = sorted(pool)
    batch, users, items, positive = np.array(pool, np.int64).reshape(-1, 4).T
    pairs, false = negative_pairs(batch, batch * 5 + users, items, positive > 0, 4)
    for of in range(4):
        mine = [(user, item, chosen) for b, user, item, chosen in pool if b == of]
        others = [(a, b) for x, a in enumerate(mine) if a[2] for y, b in enumerate(mine) if x != y]
        assert pairs[of] == len(others)
        assert false[of] == sum(a[0] == b[0] or a[1] == b[1] for a, b in others)


def test_the_false_negative_rate_of_a_small_batch() -> None:
    """User 0 has seen items 7, 8 (clicked) and 9; user 1 has seen 8 (clicked) and 5. Two positives against four others
    each: of (0, 8) two of the same user and one of the same item are false, of (1, 8) one of each: 5 of 8."""
    users, items = np.array([0, 0, 0, 1, 1]), np.array([7, 8, 9, 8, 5])
    clicked = np.array([False, True, False, True, False])
    pairs, false = negative_pairs(np.zeros(5, np.int64), users, items, clicked, 1)
    assert (pairs.tolist(), false.tolist()) == ([8], [5])


@limits(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=5))
def test_users_of_a_batch(batches: list[list[int]]) -> None:
    bounds = np.cumsum([0, *map(len, batches)])
    users = np.array([user for batch in batches for user in batch], np.int64)
    assert user_stats(bounds, users, None)[0].tolist() == [len(set(batch)) for batch in batches]

"""GAUC against pair counting: heavy ties, empty requests, unknown labels, one class, groups in any order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.metrics.gauc import MAX_GROUPS, REQUESTS, SKIPPED, WEIGHT, batch_state, gauc, grouped_state
from tests.metrics.reference import pair_gauc

# Ties, both zeros, subnormals, neighbouring floats and infinities: what a packed sort key could confuse.
LOGITS = [0.0, -0.0, 1e-45, -1e-45, 1.0, 1.0000001, -1.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf]
ROW = st.tuples(st.sampled_from(LOGITS), st.integers(0, 1), st.booleans())


@settings(max_examples=120, deadline=None)
@given(requests=st.lists(st.lists(st.tuples(ROW, ROW), max_size=6), max_size=8))
def test_equals_pair_counting(requests: list[list[tuple[tuple[float, int, bool], ...]]]) -> None:
    """Two tasks; requests may be empty, and so may the batch."""
    counts = [len(request) for request in requests]
    rows = [row for request in requests for row in request]
    cells = np.array(rows, dtype=np.float64).reshape(-1, 2, 3).astype(np.float32)
    logits, labels, known = (torch.from_numpy(cells[:, :, i].copy()) for i in range(3))
    state = batch_state(logits, labels, known, torch.tensor(counts, dtype=torch.int64))
    for task in range(2):
        expected, used, skipped = pair_gauc(cells[:, task, 0], cells[:, task, 1], cells[:, task, 2], counts)
        assert float(gauc(state)[task]) == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert (state[REQUESTS, task], state[SKIPPED, task]) == (used, skipped)


def test_groups_in_any_order() -> None:
    """By user: rows of a group lie anywhere; the figures are those of the rows gathered."""
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 40, 600))
    logits, labels = rng.integers(0, 5, (600, 1)).astype(np.float32), rng.integers(0, 2, (600, 1))
    known = rng.random((600, 1)) < 0.7
    counts = np.bincount(users, minlength=40)
    expected, used, _ = pair_gauc(logits[:, 0], labels[:, 0], known[:, 0], counts.tolist())
    order = rng.permutation(600)
    shuffled = (torch.tensor(part[order]) for part in (logits, labels.astype(np.float32), known, users))
    state = grouped_state(*shuffled, groups=40)
    assert float(gauc(state)[0]) == pytest.approx(expected, rel=1e-12)
    assert state[REQUESTS, 0] == used


def test_weight_is_the_number_of_known_impressions() -> None:
    # a request of 2 with AUC 1, one of 4 of which 3 are known with AUC 0, one of a single class
    logits = torch.tensor([[0.0], [1.0], [3.0], [1.0], [2.0], [9.0], [1.0], [2.0]])
    labels = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.0], [1.0], [1.0], [1.0]])
    known = torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0], [0.0], [1.0], [1.0]])
    state = batch_state(logits, labels, known, torch.tensor([2, 4, 2]))
    assert float(gauc(state)[0]) == pytest.approx((2 * 1 + 3 * 0) / 5)
    assert state[WEIGHT, 0] == 5
    assert state[SKIPPED, 0] == 1


def test_too_many_groups_are_refused() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="give fewer groups"):
        grouped_state(one, one, one, torch.zeros(1, dtype=torch.int64), MAX_GROUPS)

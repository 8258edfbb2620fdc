"""What the order of requests does to batches, counted where they are packed: requests of one user side by side
bias batch statistics, and turn in-batch negatives false.

The in-batch negatives of a positive impression are all other impressions of its batch that have a label, as in
retrieval's loss (``models/retrieval.py``). Those of the same user or of the same item are false ones: what the loss
masks. They are counted for the first label, and within a lane's batch, where the loss sees all lanes' batches together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

STATS = ("requests", "users", "crowded", "negative_pairs", "false_pairs")
"""int64 per batch: requests (parts of a split one count once); distinct users; requests of a user beyond the
limit of ``ingest.interleave``; pairs of a positive and an in-batch negative, and those of them that are false."""


def _codes(batch: Integers, values: Integers) -> tuple[Integers, Integers]:
    """((N,) a number per distinct (batch, value), (distinct,) how often it occurs)."""
    _, which = np.unique(values, return_inverse=True)
    distinct, codes, counts = np.unique(
        batch * (which.max(initial=0) + 1) + which, return_inverse=True, return_counts=True
    )
    del distinct
    return codes, counts


def user_stats(bounds: Integers, users: Integers, limit: int | None) -> tuple[Integers, Integers, Integers]:
    """((batches,) distinct users, (batches,) requests beyond ``limit`` of their user, (B,) a number from 0 on per
    distinct user of a batch); users (B,) in packed order."""
    batches = len(bounds) - 1
    batch = np.repeat(np.arange(batches), np.diff(bounds))
    codes, counts = _codes(batch, users)
    of = np.zeros(len(counts), np.int64)
    of[codes] = batch
    distinct = np.bincount(of, minlength=batches)
    if limit is None:
        return distinct, np.zeros(batches, np.int64), codes
    beyond = np.bincount(of, np.maximum(counts - limit, 0), minlength=batches).astype(np.int64)
    return distinct, beyond, codes


def _equal(codes: Integers, of: Integers) -> Integers:
    """(len(of),) how many ``codes`` (N,) are equal to each of ``of``, which are among them."""
    ordered = np.sort(codes)
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(codes) else codes
    equal: Integers = np.diff(np.append(begins, len(codes)))[np.searchsorted(ordered[begins], of)]
    return equal


def negative_pairs(
    batch: Integers, users: Integers, items: Integers, positive: npt.NDArray[np.bool_], batches: int
) -> tuple[Integers, Integers]:
    """((batches,) pairs of a positive and another impression of its batch, (batches,) those of the same user or item).

    Of the impressions that have a label, each (N,): ``batch``; ``users``, a small number per user of a batch, as
    ``user_stats`` gives them; ``items``, from 0 on; ``positive``.
    """
    pool, positives = np.bincount(batch, minlength=batches), np.bincount(batch[positive], minlength=batches)
    width = items.max(initial=0) + 1
    of_item, of_pair = batch * width + items, users * width + items
    same_user = np.bincount(users)[users[positive]] if len(users) else users
    same_item, both = _equal(of_item, of_item[positive]), _equal(of_pair, of_pair[positive])
    same = same_user + same_item - both - 1  # without the positive itself
    false = np.bincount(batch[positive], same, minlength=batches).astype(np.int64)
    return positives * (pool - 1), false

"""What the order of requests does to batches, counted where they are packed: requests of one user side by side
bias batch statistics, and turn in-batch negatives false.

An in-batch negative of a positive impression a (user u) is another positive b of the batch. It is false where u
has a positive on b's item in the batch: because b is the user's own, or because the item is the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

STATS = ("requests", "users", "crowded", "negative_pairs", "false_pairs")
"""int64 per batch: requests (parts of a split one count once); distinct users; requests of a user beyond the
limit of ``ingest.interleave``; ordered pairs of positives, and those of them that are false negatives."""


def _codes(batch: Integers, values: Integers) -> tuple[Integers, Integers]:
    """((N,) a number per distinct (batch, value), (distinct,) how often it occurs)."""
    _, which = np.unique(values, return_inverse=True)
    distinct, codes, counts = np.unique(
        batch * (which.max(initial=0) + 1) + which, return_inverse=True, return_counts=True
    )
    del distinct
    return codes, counts


def user_stats(bounds: Integers, users: Integers, limit: int | None) -> tuple[Integers, Integers]:
    """((batches,) distinct users, (batches,) requests beyond ``limit`` of their user); users (B,) in packed order."""
    batches = len(bounds) - 1
    batch = np.repeat(np.arange(batches), np.diff(bounds))
    codes, counts = _codes(batch, users)
    of = np.zeros(len(counts), np.int64)
    of[codes] = batch
    distinct = np.bincount(of, minlength=batches)
    if limit is None:
        return distinct, np.zeros(batches, np.int64)
    beyond = np.bincount(of, np.maximum(counts - limit, 0), minlength=batches).astype(np.int64)
    return distinct, beyond


def negative_pairs(batch: Integers, users: Integers, items: Integers, batches: int) -> tuple[Integers, Integers]:
    """((batches,) pairs of a positive and its in-batch negative, (batches,) false ones); batch, users, items (P,)
    of the positive impressions."""
    positives = np.bincount(batch, minlength=batches)
    of_user, user_counts = _codes(batch, users)
    of_item, item_counts = _codes(batch, items)
    _, first = np.unique(of_user * (len(item_counts) + 1) + of_item, return_index=True)
    # every (user, item) that is a positive: each positive of the user against each positive on the item
    products = user_counts[of_user[first]] * item_counts[of_item[first]]
    false = np.bincount(batch[first], products, minlength=batches).astype(np.int64) - positives
    return positives * (positives - 1), false

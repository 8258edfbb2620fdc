"""How many steps an epoch will have, from the manifest alone: the plan's own lanes and windows, with the batches that
their mean requests fill. No request is read; the true number is known by packing (``pack``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from roo_ray.config import Config
from roo_ray.ingest.holdout import select_files
from roo_ray.ingest.plan import EpochPlan, plan_epoch
from roo_ray.ingest.units import units_of
from roo_ray.requests.lengths import mean_ids, sequence_shares
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema

Floats = npt.NDArray[np.float64]
EPOCHS_LOOKED_AT = 3  # their numbers of steps differ little: the units are dealt anew


def kept_events(schema: Schema, tokens: Floats, shares: Mapping[str, float] | None = None) -> tuple[Floats, Floats]:
    """(history events, sum over sequences of squared lengths) of a mean request that the model sees, when requests
    have ``tokens`` (any shape) events, of which each sequence has its share (``lengths.sequence_shares``), without
    them all the same."""
    total, squares = np.zeros_like(tokens), np.zeros_like(tokens)
    for sequence in schema.sequences:
        length = tokens * (shares[sequence.name] if shares else 1 / len(schema.sequences))
        if sequence.max_length is not None:
            length = np.minimum(length, sequence.max_length)
        total, squares = total + length, squares + length**2
    return total, squares


def mean_cost(
    schema: Schema,
    coefficients: Sequence[float],
    impressions: Floats,
    tokens: Floats,
    shares: Mapping[str, float] | None = None,
) -> Floats:
    """The cost of a mean request, in the unit of the ``coefficients`` of 1, t, t squared, n and n t. ``shares``: as in
    ``kept_events``."""
    one, t, tt, n, nt = coefficients
    seen, squares = kept_events(schema, tokens, shares)
    cost: Floats = one + t * seen + tt * squares + n * impressions + nt * impressions * seen
    return cost


def expected_batches(requests: Floats, size: Floats, budget: float) -> Floats:
    """(W,) batches of windows with so many requests of the mean ``size``, filled in order up to a budget.

    A batch ends where the next request does not fit, half a request below the budget in the mean; a window's last one
    ends with the window.
    """
    filled = np.maximum(budget - size / 2, size)
    return np.minimum(np.ceil(np.round(requests * size / filled, 6)), np.ceil(requests))


def expected_steps(config: Config, manifest: Manifest, coefficients: Sequence[float]) -> float:
    """Steps of a training epoch: of the lane that has the most batches, or with ``drop_last`` the fewest; the mean
    over some epochs. ``coefficients``: the model's, of a request's cost. Raises DataError as training would."""
    ingest, holdout = config.ingest, config.holdout
    units = units_of(select_files(manifest, holdout, "train"))
    share = 1.0 - holdout.fraction if holdout.by == "request" else 1.0
    schema = config.request_schema
    events = sequence_shares(schema, manifest, mean_ids(schema, manifest, config.requests))
    plans = (
        plan_epoch(
            units,
            seed=config.training.seed,
            epoch=epoch,
            lanes=ingest.lanes,
            window_units=ingest.window_units,
            mode=ingest.mode,
        )
        for epoch in range(min(config.training.epochs, EPOCHS_LOOKED_AT))
    )

    def steps(plan: EpochPlan) -> float:
        lanes = [_batches_of_lane(config, plan, lane, share, coefficients, events) for lane in range(ingest.lanes)]
        return min(lanes) if ingest.drop_last else max(lanes)

    return float(np.mean([steps(plan) for plan in plans]))


def _batches_of_lane(
    config: Config,
    plan: EpochPlan,
    lane: int,
    share: float,
    coefficients: Sequence[float],
    events: Mapping[str, float],
) -> float:
    chosen, units, ingest = plan.lanes[lane], plan.units, config.ingest
    if not len(chosen):
        return 0.0
    starts = plan.bounds[lane][:-1]
    sums = [np.add.reduceat(of[chosen], starts) for of in (units.requests, units.impressions, units.tokens)]
    requests, impressions, tokens = (total.astype(np.float64) for total in sums)
    impressions, tokens = impressions / requests, tokens / requests
    batches = np.zeros(len(starts))
    if ingest.batch_impressions:
        batches = np.maximum(batches, expected_batches(requests * share, impressions, ingest.batch_impressions))
    if ingest.batch_cost:
        cost = mean_cost(config.request_schema, coefficients, impressions, tokens, events)
        batches = np.maximum(batches, expected_batches(requests * share, cost, ingest.batch_cost))
    return float(batches.sum())

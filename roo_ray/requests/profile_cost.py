"""A prediction of step time: floating-point operations of the ranking model, impression-level against request-level.

Analytic, nothing is run: multiply-adds of the model's matrices at the sample's numbers of impressions and history
lengths, and the memory traffic of lookups and elementwise work as so many operations a float. It predicts a ratio
for one process, and lies within a factor of 2 of ten measured ones (a test has them); where a model is measured, that
goes before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from roo_ray.config import Model
from roo_ray.schema import Schema

FLOATS_AS_FLOPS = 16.0  # operations that a float read from memory is worth: a CPU core's flops over its bandwidth
ELEMENTWISE_PER_LAYER = 12  # floats moved per value and HSTU layer: norms, activations, gates
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepCost:
    """Operations of one pass over the sample, in both forms. ``user_side`` / ``impression_side``: of one request
    and of one impression, on average; lookups are embedding rows."""

    impression_level: float
    request_level: float
    user_side: float
    impression_side: float
    lookups_impression_level: int
    lookups_request_level: int

    @property
    def speed_up(self) -> float:
        """Predicted step time of impression-level over request-level training."""
        return self.impression_level / self.request_level

    @property
    def lookup_ratio(self) -> float:
        """Embedding rows looked up, impression-level over request-level."""
        return self.lookups_impression_level / max(self.lookups_request_level, 1)


def predict(
    schema: Schema, model: Model, impressions: npt.NDArray[np.int64], histories: dict[str, npt.NDArray[np.int64]]
) -> StepCost:
    """``impressions`` (R,) of each request; ``histories``: sequence -> (R,) lengths, cut to their ``max_length``
    here."""
    dims = {name: table.dim for name, table in schema.tables.items()}
    requests, shown = len(impressions), impressions.astype(np.float64)
    user_ids = [dims[str(f.table)] for f in schema.select("request", "ids")]
    width = schema.dense_width("request") + sum(user_ids)
    user = np.full(requests, FLOATS_AS_FLOPS * sum(user_ids))  # (R,)
    lookups = np.full(requests, len(user_ids), np.int64)
    for feature in schema.sequences:
        tables = [dims[c.table] for c in feature.sequence if c.table]
        lengths = np.minimum(histories[feature.name], feature.max_length or 0).astype(np.float64)
        user += _history(model, lengths, sum(tables), len(feature.sequence) - len(tables))
        lookups += (lengths * len(tables)).astype(np.int64)
        width += 3 * model.dim + sum(tables) + 1
    user += _layers([width, 2 * model.user_dim, model.user_dim])

    items = {f.name: dims[str(f.table)] for f in schema.select("impression", "ids")}
    matches = sum(items.values()) + sum(
        dims[str(f.table)]
        for f in schema.select("impression", "ids")
        for s in schema.sequences
        for c in s.sequence
        if c.table == f.table
    )
    width = model.user_dim + schema.dense_width("impression") + sum(items.values()) + matches
    impression = FLOATS_AS_FLOPS * (sum(items.values()) + 2 * width)
    impression += model.cross_layers * (4 * width * model.cross_rank + FLOATS_AS_FLOPS * width)
    impression += _layers([width, *model.tower, len(schema.labels)])

    everything = float((shown * user).sum() + shown.sum() * impression)
    return StepCost(
        impression_level=everything,
        request_level=float(user.sum() + shown.sum() * impression),
        user_side=float(user.mean()),
        impression_side=impression,
        lookups_impression_level=int((impressions * (lookups + len(items))).sum()),
        lookups_request_level=int(lookups.sum() + impressions.sum() * len(items)),
    )


def _layers(widths: list[int]) -> float:
    return float(sum(2 * a * b + FLOATS_AS_FLOPS * b for a, b in pairwise(widths)))


def _history(model: Model, lengths: Floats, ids: int, dense: int) -> Floats:
    """(R,) operations of lookup, token projection and HSTU layers (arXiv 2402.17152): five projections of the
    tokens, and attention over all earlier events."""
    dim = model.dim
    tokens = FLOATS_AS_FLOPS * ids + 2 * (ids + dense) * dim
    layer = 10 * dim * dim + ELEMENTWISE_PER_LAYER * FLOATS_AS_FLOPS * dim
    pairs = lengths * (lengths + 1) / 2
    attention = pairs * (4 * dim + FLOATS_AS_FLOPS * model.heads)
    total: Floats = lengths * (tokens + model.layers * layer) + model.layers * attention
    return total

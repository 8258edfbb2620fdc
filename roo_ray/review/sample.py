"""What the requests of a data set look like, from a sample of its units, and what that saves a training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roo_ray.config import Model
from roo_ray.ingest.lists import split_lists
from roo_ray.ingest.read import NUM_IMPRESSIONS
from roo_ray.ingest.rows import read_requests
from roo_ray.ingest.units import units_of
from roo_ray.models.cost import cost_coefficients
from roo_ray.models.pooled import pooled_levels
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema

Integers = npt.NDArray[np.int64]
SAMPLED_UNITS = 32
FLOAT_BYTES, ID_BYTES = 4, 8


@dataclass(frozen=True)
class RequestSample:
    """``impressions`` (R,) per request; ``events``: sequence -> (R,) stored events, before ``max_length`` cuts them;
    ``of``: requests in the data set."""

    impressions: Integers
    events: dict[str, Integers]
    of: int


def sample_requests(data_set: str, manifest: Manifest, schema: Schema, units: int = SAMPLED_UNITS) -> RequestSample:
    """Reads the lengths of at most so many units, spread evenly over the data set."""
    every = units_of(manifest.files)
    chosen = np.unique(np.linspace(0, len(every) - 1, min(units, len(every))).astype(np.int64)).tolist()
    first = {f.name: f.sequence_ids[0].column for f in schema.sequences}
    columns = [NUM_IMPRESSIONS, *first.values()]
    columns += [c for c in schema.keys.request if c not in columns]
    parts = [read_requests(data_set, [every.ref(unit)], schema, columns=columns).table for unit in chosen]
    counts = np.concatenate([np.asarray(part.column(NUM_IMPRESSIONS)).astype(np.int64) for part in parts])
    events = {
        name: np.concatenate([split_lists(part.column(column).combine_chunks()).lengths for part in parts])
        for name, column in first.items()
    }
    return RequestSample(counts, events, manifest.requests)


def training_ratios(sample: RequestSample, schema: Schema, model: Model) -> dict[str, float]:
    """What the impression-level form costs over the request-level form of the same requests, on the sample:
    ``dedup_ratio_lookups`` (ids looked up), ``dedup_ratio_all_to_all_bytes`` (ids out, embeddings back, gradients
    out, were every table on another rank), ``dedup_ratio_flops`` (matrix products of the dense part; needs no run).
    """
    n = sample.impressions
    total = {"lookups": np.zeros(2), "all_to_all_bytes": np.zeros(2)}  # impression-level, request-level

    levels = pooled_levels(schema, model.embeddings.pooled)

    def add(per_request: Integers, once: bool, dim: int, vectors: int | None = None) -> None:
        """``vectors``: embeddings sent in either form, where they are not one per id."""
        repeated = float((per_request * n).sum()) if once else float(per_request.sum())
        ids = np.array([repeated, float(per_request.sum())])
        total["lookups"] += ids
        total["all_to_all_bytes"] += ids * ID_BYTES
        total["all_to_all_bytes"] += (ids if vectors is None else vectors) * 2 * dim * FLOAT_BYTES

    tokens = np.zeros(len(n), np.int64)
    for feature in schema.features:
        if feature.kind == "sequence":
            kept = np.minimum(sample.events[feature.name], feature.max_length or 0)
            tokens = tokens + kept
            for column in feature.sequence_ids:
                add(kept, True, schema.tables[column.table or ""].dim)
        elif feature.kind == "ids" and feature.table:
            # bags count as one id here: their lengths are not sampled
            once = feature.level == "request"
            # a pooled table that bags of impressions read sends a vector per impression for bags of requests too
            vectors = int(n.sum()) if once and levels.get(feature.table) == "impression" else None
            add(np.ones_like(n) if once else n, once, schema.tables[feature.table].dim, vectors)
    cost = cost_coefficients(schema, model)
    t = tokens.astype(np.float64)
    request = cost["1"] + cost["t"] * t + cost["t2"] * t * t + cost["n"] * n + cost["nt"] * n * t
    impression = n * (cost["1"] + cost["t"] * t + cost["t2"] * t * t + cost["n"] + cost["nt"] * t)
    ratios = {f"dedup_ratio_{name}": float(both[0] / both[1]) for name, both in total.items() if both[1]}
    if request.sum():
        ratios["dedup_ratio_flops"] = float(impression.sum() / request.sum())
    return ratios

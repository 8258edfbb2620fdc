"""What a request costs a model, as a polynomial in its history and impressions: ingest fills batches by it.

Ingest never imports models: a job asks here for the numbers and hands them on.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs, SequenceInputs
from roo_ray.models.features import candidate_widths, sequence_widths
from roo_ray.models.ranking import make_towers
from roo_ray.schema import Schema

TERMS = ("1", "t", "t2", "n", "nt")
_MOST_EVENTS = 1024  # counted at; beyond, attention in blocks is all but quadratic
_FORWARD_AND_BACKWARD = 3


def cost_coefficients(schema: Schema, model_config: Model) -> dict[str, float]:
    """Coefficients of ``cost = c["1"] + c["t"] t + c["t2"] t**2 + c["n"] n + c["nt"] n t`` of a request with t
    history events and n impressions, in floating-point operations of the dense part's forward pass (training
    takes about three times as much of each term).

    Counted, not written down: the towers run on a request with no, half of and all of ``max_length`` events (at most
    1,024) and with one or two impressions, while torch counts their matrix products; the polynomial goes through the
    counts. It is exact where ``max_length`` is at most 80. Above, causal attention in blocks of queries skips scores by
    steps: t2 is what it computes at ``max_length``, and lengths between are off by up to 12 %, short ones the most (the
    table in docs/models.md). Where a schema has several
    sequences, t is the sum of their events, taken to be spread in proportion to their ``max_length``. Lookups and
    elementwise work are not in it.
    """
    names = [f.name for f in schema.sequences]
    with torch.random.fork_rng(devices=[]):
        towers = make_towers(schema, model_config).eval()

    def flops(events: dict[str, int], impressions: int) -> float:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            towers(example_inputs(schema, events, impressions))
        return float(counter.get_total_flops())

    none = dict.fromkeys(names, 0)
    one = flops(none, 1)
    per_impression = flops(none, 2) - one
    found = {"1": one - per_impression, "t": 0.0, "t2": 0.0, "n": per_impression, "nt": 0.0}
    longest = {f.name: float(f.max_length or 0) for f in schema.sequences}
    for name in names:
        share = longest[name] / sum(longest.values())
        half = max(1, int(min(longest[name], _MOST_EVENTS)) // 2)
        few, many = flops(none | {name: half}, 1), flops(none | {name: 2 * half}, 1)
        squared = (many - 2 * few + one) / (2 * half**2)
        crossed = (flops(none | {name: half}, 2) - few - per_impression) / half
        found["t"] += share * ((few - one) / half - squared * half - crossed)
        found["t2"] += share**2 * squared
        found["nt"] += share * crossed
    return found


def training_megaflops(schema: Schema, model_config: Model) -> tuple[float, float, float, float, float]:
    """The coefficients of 1, t, t squared, n and n t in millions of floating-point operations of a training step:
    what ``ingest.batch_cost`` counts in."""
    counted = cost_coefficients(schema, model_config)
    one, t, tt, n, nt = (round(_FORWARD_AND_BACKWARD * 1e-6 * counted[term], 9) for term in TERMS)
    return one, t, tt, n, nt


def example_inputs(schema: Schema, events: dict[str, int], impressions: int) -> ModelInputs:
    """Inputs of one request with so many events per sequence and impressions; all values 0."""
    sequences = {}
    for feature in schema.sequences:
        count = events[feature.name]
        widths = sequence_widths(schema)[feature.name]
        sequences[feature.name] = SequenceInputs(
            ids={column: torch.zeros(count, width) for column, width in widths.items()},
            dense=torch.zeros(count, len(feature.sequence_dense)),
            ages=torch.ones(count) if feature.time else None,
            lengths=torch.tensor([count]),
        )
    request_ids = {
        f.name: torch.zeros(1, schema.tables[f.table].dim) for f in schema.select("request", "ids") if f.table
    }
    return ModelInputs(
        num_impressions=torch.tensor([impressions]),
        request_dense=torch.zeros(1, schema.dense_width("request")),
        impression_dense=torch.zeros(impressions, schema.dense_width("impression")),
        request_ids=request_ids,
        sequences=sequences,
        impression_ids={name: torch.zeros(impressions, width) for name, width in candidate_widths(schema).items()},
        request_key=torch.zeros(1, dtype=torch.int64),
        impression_key=torch.arange(impressions),
        impression_real=torch.ones(impressions, dtype=torch.bool),
    )

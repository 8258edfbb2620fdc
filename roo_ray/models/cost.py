"""What a request costs a model, as a polynomial of its history tokens t and its impressions n.

Published as plain numbers, the coefficients of 1, t, t squared, n and n t: the ingest fills and balances batches
by them without knowing any model. The unit is a million floating-point operations of a forward and a backward
pass; only ratios matter.
"""

from __future__ import annotations

from roo_ray.config import Model
from roo_ray.schema import Schema

_FLOPS = 6e-6  # a multiply-add is 2 operations, and backward costs twice forward; in millions


def cost_coefficients(schema: Schema, model: Model) -> tuple[float, float, float, float, float]:
    """The coefficients of 1, t, t squared, n and n t for the HSTU ranking model of a config."""
    dim, user = model.dim, model.user_dim
    ids = [schema.tables[c.table or ""].dim for f in schema.sequences for c in f.sequence_ids]
    dense = sum(len(f.sequence_dense) for f in schema.sequences)
    token = (sum(ids) + dense) * dim + model.layers * 5 * dim * dim
    pairs = model.layers * dim  # scores and weighted values over the causal half of the pairs
    request_ids = sum(schema.tables[f.table or ""].dim for f in schema.select("request", "ids"))
    width = schema.dense_width("request") + request_ids + len(schema.sequences) * 3 * dim + sum(ids)
    request = width * 2 * user + 2 * user * user
    candidates = sum(schema.tables[f.table or ""].dim for f in schema.select("impression", "ids"))
    width = user + schema.dense_width("impression") + 3 * candidates
    impression = model.cross_layers * 2 * width * model.cross_rank
    for layer in model.tower:
        impression += width * layer
        width = layer
    impression += width * len(schema.labels)
    return (_FLOPS * request, _FLOPS * token, _FLOPS * pairs, _FLOPS * impression, 0.0)

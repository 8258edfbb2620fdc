"""Matches of a candidate and its request: what a map of them starts as."""

import torch
from torch import nn

from roo_ray.models.cost import example_inputs
from roo_ray.models.features import Matches, candidate_widths, shared_tables
from tests.models.batches import schema


def test_a_score_of_matches_starts_as_dot_products() -> None:
    generator = torch.Generator().manual_seed(0)
    of = schema()
    matches = Matches(of, 8)
    score = nn.Linear(matches.width, 2)
    matches.start_as_dots(score)
    inputs = example_inputs(of, {"history": 3, "searches": 1}, 5)
    for values in inputs.impression_ids.values():
        values.copy_(torch.randn(values.shape, generator=generator))
    widths = candidate_widths(of)
    pairs = [(f"query.{name}", name) for name in widths] + shared_tables(of)
    vectors = {name: torch.randn(5, widths[candidate], generator=generator) for name, candidate in pairs}
    expected = sum((vectors[name] * inputs.impression_ids[candidate]).sum(1) for name, candidate in pairs)
    with torch.no_grad():
        scores = score(matches(vectors, inputs)) - score.bias
    torch.testing.assert_close(scores, torch.stack([expected, expected], dim=1))  # type: ignore[list-item]

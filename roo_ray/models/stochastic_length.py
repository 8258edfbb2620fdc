"""HSTU's stochastic length (arXiv 2402.17152, section 3.2): in training, long histories are subsampled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.models.jagged import segment_sum
from roo_ray.models.keyed_random import KeyedRandom, combine_keys, token_keys, uniform
from roo_ray.schema import Schema


class StochasticLength(KeyedRandom):
    """A history of n events, longer than ``k = max_length ** (alpha / 2)``, keeps all of them with probability
    ``(k / n) ** 2`` and otherwise a random k of them, in order. Both choices are keyed by seed, epoch and request,
    and are made on ids, before the lookup: dropped events cost no lookup either."""

    def __init__(self, schema: Schema, alpha: float | None) -> None:
        super().__init__("stochastic_length")
        self.schema, self.alpha = schema, alpha

    def forward(self, batch: RequestBatch) -> RequestBatch:
        """The batch with shorter histories."""
        if self.alpha is None:
            return batch
        request_ids, sequence_dense = dict(batch.request_ids), dict(batch.sequence_dense)
        sequence_time = dict(batch.sequence_time)
        for place, feature in enumerate(self.schema.sequences):
            assert feature.max_length is not None
            ids = [f"{feature.name}.{column.column}" for column in feature.sequence_ids]
            lengths = request_ids[ids[0]].lengths
            short = max(1, round(feature.max_length ** (self.alpha / 2)))
            kept = self.kept_events(combine_keys(batch.request_key, place), lengths, short)  # (T,) bool
            left = segment_sum(kept.double().unsqueeze(1), lengths).squeeze(1).long()  # (B_RO,)
            for key in ids:
                request_ids[key] = Jagged(request_ids[key].values[kept], left)
            sequence_dense[feature.name] = sequence_dense[feature.name][kept]
            if feature.time:
                sequence_time[feature.name] = sequence_time[feature.name][kept]
        return replace(batch, request_ids=request_ids, sequence_dense=sequence_dense, sequence_time=sequence_time)

    def kept_events(self, keys: Tensor, lengths: Tensor, short: int) -> Tensor:
        """keys, lengths (B_RO,) -> (T,) bool."""
        draw = uniform(self.run_key, keys, 1).squeeze(1)  # (B_RO,)
        whole = (lengths <= short) | (draw * lengths.square() < short**2)
        request = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)  # (T,)
        draws = uniform(self.run_key, token_keys(keys, lengths), 1).squeeze(1)  # (T,)
        order = torch.argsort(draws, stable=True)
        order = order[torch.argsort(request[order], stable=True)]  # by request, then by draw
        rank = torch.empty_like(order)
        starts = (lengths.cumsum(0) - lengths)[request]  # (T,)
        rank[order] = torch.arange(len(order), device=order.device) - starts
        return whole[request] | (rank < short)

"""The contract of a request-only model: a user side at B_RO rows, a late fan-out, an impression side at B_NRO.

A team's own architecture is a ``RequestOnlyModel``: it says what it computes once per request (``user_side``)
and what once per impression (``impression_side``). It sees plain tensors (``ModelInputs``): lookup and sharding
of embeddings stay outside. The same module takes a request batch and its impression-level form
(``RequestBatch.explode``), and must give the same logits for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from roo_ray.models.jagged import segment_sum


def fan_out(values: Tensor, num_impressions: Tensor, total_impressions: int | None = None) -> Tensor:
    """Repeats each request's row for each of its impressions: (B_RO, D) -> (B_NRO, D).

    ``total_impressions``: B_NRO where it is known; it spares a GPU the wait for ``num_impressions.sum()``.
    """
    return torch.repeat_interleave(values, num_impressions, dim=0, output_size=total_impressions)


@dataclass(frozen=True)
class SequenceInputs:
    """An event sequence after lookup, oldest event first; T is the events of all requests.

    ids      id column -> (T, D) float32 embeddings.
    dense    (T, C) float32; C may be 0.
    ages     (T,) float32 seconds from the event to the request, positive; None where the sequence has no time.
    lengths  (B_RO,) int64.
    """

    ids: dict[str, Tensor]
    dense: Tensor
    ages: Tensor | None
    lengths: Tensor


@dataclass(frozen=True)
class ModelInputs:
    """What the dense part of a model sees of a batch: plain tensors, embeddings looked up and pooled.

    num_impressions   (B_RO,) int64, at least 1.
    request_dense     (B_RO, D_r) float32.
    impression_dense  (B_NRO, D_n) float32.
    request_ids       feature -> (B_RO, D) float32 embeddings.
    sequences         feature -> SequenceInputs.
    impression_ids    feature -> (B_NRO, D) float32 embeddings.
    request_key       (B_RO,) int64, impression_key (B_NRO,) int64: key the random choices of a request and of
                      an impression (``keyed_random``); the same in both forms of a batch.
    impression_real   (B_NRO,) bool: False for the dummy request of a rank without data (and for impressions
                      without any known label): statistics of the batch must leave them out.
    """

    num_impressions: Tensor
    request_dense: Tensor
    impression_dense: Tensor
    request_ids: dict[str, Tensor]
    sequences: dict[str, SequenceInputs]
    impression_ids: dict[str, Tensor]
    request_key: Tensor
    impression_key: Tensor
    impression_real: Tensor

    @property
    def total_impressions(self) -> int:
        """B_NRO."""
        return self.impression_dense.shape[0]

    @property
    def impression_weight(self) -> Tensor:
        """(B_NRO,) float32: 1, and 0 for a dummy: how much an impression counts in statistics of the batch."""
        return self.impression_real.float()

    @property
    def request_weight(self) -> Tensor:
        """(B_RO,) float32: how much a request counts there: its real impressions."""
        return segment_sum(self.impression_weight.unsqueeze(1), self.num_impressions).squeeze(1)


@dataclass(frozen=True)
class UserState:
    """What is known of each request, by name.

    vectors  (B_RO, D_name), or (B_NRO, D_name) after ``fan_out``.
    tokens   (T, D_name) per event of a sequence: keys and values that candidates attend to. They are not fanned
             out: ``target_attention`` lets all candidates of a request read the one copy.
    """

    vectors: dict[str, Tensor]
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def fan_out(self, inputs: ModelInputs) -> UserState:
        """The state of each impression's request: every vector (B_RO, D) -> (B_NRO, D), in one copy."""
        if not self.vectors:
            return self
        widths = [vector.shape[1] for vector in self.vectors.values()]
        joined = torch.cat(list(self.vectors.values()), dim=1)  # (B_RO, sum of D)
        spread = fan_out(joined, inputs.num_impressions, inputs.total_impressions)  # (B_NRO, sum of D)
        return UserState(dict(zip(self.vectors, spread.split(widths, dim=1), strict=True)), self.tokens)


class RequestOnlyModel(nn.Module, ABC):
    """The dense part of a request-only model. Every parameter must take part in every forward pass (with empty
    tensors if need be), because data-parallel ranks wait for each other's gradients."""

    @abstractmethod
    def user_side(self, inputs: ModelInputs) -> UserState:
        """Runs once per request; must not look at impression-level inputs."""

    @abstractmethod
    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Runs once per impression on the fanned-out user state -> logits (B_NRO, K) float32. A candidate may see
        the user state and itself, never another candidate."""

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K) float32, one column per label of the schema."""
        return self.impression_side(self.user_side(inputs).fan_out(inputs), inputs)

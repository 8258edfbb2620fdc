"""A model's random choices as pure functions of (seed, epoch, what the row is): of a request, an impression or an
event. They depend neither on the world size nor on the form of the batch, so that parity holds with them too.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from roo_ray.ingest.batch import segment_positions
from roo_ray.models.initialise import as_int64, mix64

_GOLDEN = as_int64(0x9E3779B97F4A7C15)


def combine_keys(keys: Tensor, more: Tensor | int) -> Tensor:
    """int64 keys of pairs: (N,) and (N,) or a number -> (N,)."""
    step = more * _GOLDEN
    if isinstance(step, int):  # wraps around, as products of tensors do
        step = as_int64(step & ((1 << 64) - 1))
    return mix64(mix64(keys) + step)


def token_keys(request_key: Tensor, lengths: Tensor) -> Tensor:
    """Keys of the events of a sequence, by request and place: request_key (B_RO,), lengths (B_RO,) -> (T,).

    Places count from -1 down: impressions count from 0 up, and an event must not draw what a candidate draws."""
    places = segment_positions(lengths)  # (T,)
    return combine_keys(torch.repeat_interleave(request_key, lengths, output_size=places.numel()), ~places)


def uniform(run_key: int, keys: Tensor, columns: int) -> Tensor:
    """Uniform numbers in [0, 1): keys (N,) int64 -> (N, columns) float32, from the run's key and the row's."""
    column = torch.arange(columns, device=keys.device) * _GOLDEN
    mixed = mix64(mix64(keys + run_key).unsqueeze(1) + column)  # (N, columns)
    return ((mixed >> 40) & 0xFFFFFF).float() * 2.0**-24


class KeyedRandom(nn.Module):
    """Base of modules that draw random numbers. ``name``: tells the draws of one module from another's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.set_epoch(0, 0)

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Sets what the draws depend on beside the rows."""
        digest = hashlib.sha256(f"{seed}/{epoch}/{self.name}".encode()).digest()
        self.run_key = int.from_bytes(digest[:8], "little", signed=True)


def set_epoch(model: nn.Module, seed: int, epoch: int) -> None:
    """Gives all random modules in ``model`` their draws of an epoch."""
    for module in model.modules():
        if isinstance(module, KeyedRandom):
            module.set_epoch(seed, epoch)


class KeyedDropout(KeyedRandom):
    """Dropout whose mask is a function of seed, epoch, ``name`` and each row's key. Active in training alone."""

    def __init__(self, share: float, name: str) -> None:
        super().__init__(name)
        self.share = share

    def forward(self, values: Tensor, keys: Tensor) -> Tensor:
        """values (N, D), keys (N,) int64 -> (N, D)."""
        if not self.training or self.share == 0:
            return values
        kept = uniform(self.run_key, keys, values.shape[1]) >= self.share
        return values * kept * (1.0 / (1.0 - self.share))

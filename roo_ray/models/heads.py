"""From an impression's vector to logits: one tower for all tasks or MMoE, and position as a debiasing term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs
from roo_ray.models.features import position_column
from roo_ray.models.interaction import LowRankCross, Tower, symmetric_log
from roo_ray.models.keyed_random import KeyedDropout
from roo_ray.schema import Schema


class SharedBottom(nn.Module):
    """One tower, a linear head per task."""

    def __init__(self, inputs: int, tasks: int, settings: Model) -> None:
        super().__init__()
        self.tower = Tower(inputs, settings.tower, settings.normalisation)
        self.heads = nn.Linear(self.tower.width, tasks)

    def forward(self, values: Tensor, weights: Tensor) -> Tensor:
        """(B_NRO, inputs) -> logits (B_NRO, K)."""
        return self.heads(self.tower(values, weights))  # type: ignore[no-any-return]


class MMoE(nn.Module):
    """Multi-gate mixture of experts (KDD 2018, section 4.2): each task mixes the towers by a softmax gate of its
    own, then a linear head."""

    def __init__(self, inputs: int, tasks: int, settings: Model) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            Tower(inputs, settings.tower, settings.normalisation) for _ in range(settings.experts)
        )
        width = settings.tower[-1] if settings.tower else inputs
        self.gates = nn.Linear(inputs, tasks * settings.experts)
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))

    def forward(self, values: Tensor, weights: Tensor) -> Tensor:
        """(B_NRO, inputs) -> logits (B_NRO, K)."""
        experts = torch.stack([expert(values, weights) for expert in self.experts], dim=1)  # (B_NRO, E, W)
        gates = self.gates(values).view(len(values), len(self.heads), -1).softmax(dim=2)  # (B_NRO, K, E)
        mixed = gates @ experts  # (B_NRO, K, W)
        return torch.cat([head(mixed[:, task]) for task, head in enumerate(self.heads)], dim=1)


class PositionBias(nn.Module):
    """Logits from the position alone, added to those of relevance (a "shallow tower"): in serving the position is
    fixed, and what remains is relevance. Nothing without ``model.position_feature``."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        self.column = position_column(schema, settings)
        tasks = len(schema.labels)
        self.tower = None if self.column is None else nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, tasks))

    def forward(self, logits: Tensor, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K) -> logits."""
        if self.tower is None:
            return logits
        bias: Tensor = self.tower(symmetric_log(inputs.impression_dense[:, self.column, None]))
        return logits + bias


class CrossAndHeads(nn.Module):
    """DCNv2 cross layers over all that is known of an impression, then the tasks' towers and heads."""

    def __init__(self, inputs: int, schema: Schema, settings: Model) -> None:
        super().__init__()
        tasks = len(schema.labels)
        self.cross = LowRankCross(inputs, settings.cross_layers, settings.cross_rank)
        self.dropout = KeyedDropout(settings.dropout, "cross")
        self.tasks = (MMoE if settings.task_heads == "mmoe" else SharedBottom)(inputs, tasks, settings)
        self.position = PositionBias(schema, settings)

    def forward(self, values: Tensor, inputs: ModelInputs) -> Tensor:
        """(B_NRO, inputs) -> logits (B_NRO, K)."""
        crossed = self.dropout(self.cross(values), inputs.impression_key)
        logits = self.tasks(crossed, inputs.impression_weight)
        return self.position(logits, inputs)  # type: ignore[no-any-return]

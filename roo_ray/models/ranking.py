"""A request-only model whole: what is done to a batch before the lookup, the lookup, the towers."""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.errors import ConfigError
from roo_ray.ingest.batch import RequestBatch
from roo_ray.models.architectures import ARCHITECTURES
from roo_ray.models.contract import ModelInputs, RequestOnlyModel
from roo_ray.models.embeddings import EmbeddingLookup, model_inputs, without_future_events
from roo_ray.models.features import position_column
from roo_ray.models.normalise import plain_batch_norms
from roo_ray.models.precision import at_least_float32
from roo_ray.models.stochastic_length import StochasticLength
from roo_ray.schema import Schema


def make_towers(schema: Schema, settings: Model) -> RequestOnlyModel:
    """The dense part that ``model.towers`` or ``model.kind`` names. Raises ConfigError where it cannot be had."""
    if settings.towers is None:
        return ARCHITECTURES[settings.kind](schema, settings)  # type: ignore[call-arg]
    module_name, name = settings.towers.split(":")
    try:
        towers = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.towers '{settings.towers}' cannot be imported: {error}") from None
    if not (isinstance(towers, type) and issubclass(towers, RequestOnlyModel)):
        raise ConfigError(f"model.towers '{settings.towers}' is no RequestOnlyModel (roo_ray.models.contract)")
    return towers(schema, settings)  # type: ignore[call-arg]


class RankingModel(nn.Module):
    """Embedding tables (``sparse``) and towers (``dense``) of a model.

    ``sparse_device``: where the tables are made, ``meta`` where TorchRec allocates them; set their weights by
    ``initialise_tables``. The dense part's initial weights come from torch's global random state alone,
    wherever the tables are: seed it before. ``ids_device``: where the maps of managed tables are (by default, where
    the tables are made, or the CPU). ``autocast``: the towers run in bfloat16 where that is safe.
    """

    def __init__(
        self,
        schema: Schema,
        settings: Model,
        sparse_device: torch.device | None = None,
        autocast: bool = False,
        ids_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.schema, self.autocast = schema, autocast
        self.dense = make_towers(schema, settings)  # first: making tables on a real device draws random numbers
        for line in plain_batch_norms(self.dense):
            warnings.warn(line, stacklevel=2)
        self.shorten = StochasticLength(schema, settings.stochastic_length)
        self.position = position_column(schema, settings)
        self.position_value = _as_ingested(schema, settings)
        tables = settings.embeddings
        self.sparse = EmbeddingLookup(schema, sparse_device, tables.weights, tables.pooled, tables.managed, ids_device)

    def inputs(self, batch: RequestBatch) -> ModelInputs:
        """What the towers see of a batch: no event from the request's time on, in training histories of
        stochastic length, otherwise the position that is fixed for serving; embeddings looked up."""
        batch = without_future_events(batch, self.schema)
        if self.training:
            batch = self.shorten(batch)
        elif self.position is not None:
            dense = batch.impression_dense.clone()
            dense[:, self.position] = self.position_value
            batch = replace(batch, impression_dense=dense)
        return model_inputs(self.schema, batch, self.sparse(batch))

    def forward(self, batch: RequestBatch) -> Tensor:
        """Logits (B_NRO, K) float32, a column per label in the schema's order, for a request batch or its
        impression-level form. (Retrieval: one column of scores.)"""
        inputs = self.inputs(batch)
        with torch.autocast(inputs.impression_dense.device.type, torch.bfloat16, enabled=self.autocast):
            logits: Tensor = self.dense(inputs)
        return at_least_float32(logits)


def _as_ingested(schema: Schema, settings: Model) -> float:
    """``position_value`` on the scale that the ingest puts the column on."""
    value, dense = settings.position_value, schema.select("impression", "dense")
    scales = [feature.scale for feature in dense if settings.position_feature in feature.columns]
    return math.log1p(max(value, 0.0)) if scales[:1] == ["log1p"] else value  # the first, as position_column has it

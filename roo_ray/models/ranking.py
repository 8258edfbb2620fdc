"""A request-only ranking model: history and user tower once per request, DCNv2 and heads per impression."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.ingest.batch import RequestBatch
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.embeddings import EmbeddingLookup, model_inputs, without_future_events
from roo_ray.models.hstu import HistoryEncoder
from roo_ray.models.interaction import LowRankCross, Tower, symmetric_log
from roo_ray.models.jagged import segment_mean
from roo_ray.schema import Schema


class RankingTowers(RequestOnlyModel):
    """The dense part.

    User side: each sequence's HSTU encoding, the plain mean of its embeddings per id column (the user's
    interests: a bag of items, a bag of topics), RO ids and dense features -> user vector.
    Impression side: user vector; candidate embeddings; their elementwise and dot products with a projection of
    the user vector and with the interests on the same table; NRO dense features -> cross layers -> tower -> one
    head per label.
    """

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        dims = {name: table.dim for name, table in schema.tables.items()}
        candidates = {f.name: f.table or "" for f in schema.select("impression", "ids")}
        columns = {f.name: {c.column: c.table or "" for c in f.sequence_ids} for f in schema.sequences}
        self.columns = {name: {c: dims[t] for c, t in tables.items()} for name, tables in columns.items()}
        self.candidates = {name: dims[table] for name, table in candidates.items()}
        # a history column and a candidate that read the same table
        self.pairs = [
            (f"{sequence}.{column}", candidate)
            for sequence, tables in columns.items()
            for column, table in tables.items()
            for candidate, of in candidates.items()
            if of == table
        ]
        self.encoders = nn.ModuleDict(
            {f.name: HistoryEncoder(f, sum(self.columns[f.name].values()), settings) for f in schema.sequences}
        )
        width = schema.dense_width("request") + sum(dims[f.table or ""] for f in schema.select("request", "ids"))
        for columns_of in self.columns.values():
            width += HistoryEncoder.WIDTHS * settings.dim + sum(columns_of.values()) + 1
        self.user_tower = Tower(width, [2 * settings.user_dim, settings.user_dim])
        self.matches = [(f"query.{name}", name) for name in candidates] + self.pairs
        if candidates:
            self.queries = nn.Linear(settings.user_dim, sum(self.candidates.values()))

        width = settings.user_dim + schema.dense_width("impression") + sum(self.candidates.values())
        width += sum(self.candidates[candidate] + 1 for _, candidate in self.matches)
        self.cross = LowRankCross(width, settings.cross_layers, settings.cross_rank)
        self.tower = Tower(width, settings.tower)
        self.heads = nn.Linear(self.tower.width, len(schema.labels))

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, user_dim); per candidate feature ``query.feature`` (B_RO, D); the interests that a
        candidate is matched with, ``sequence.column`` (B_RO, D)."""
        parts = [symmetric_log(inputs.request_dense), *inputs.request_ids.values()]
        interests: dict[str, Tensor] = {}
        for name, encoder in self.encoders.items():
            sequence, columns = inputs.sequences[name], self.columns[name]
            ids = torch.cat([sequence.ids[column] for column in columns], dim=1)  # (T, sum of D)
            bags = segment_mean(ids, sequence.lengths)  # (B_RO, sum of D)
            events = sequence.lengths.to(ids.dtype).log1p().unsqueeze(1)  # (B_RO, 1)
            parts += [encoder(ids, sequence), bags, events]
            split = bags.split(list(columns.values()), dim=1)
            interests |= {f"{name}.{column}": bag for column, bag in zip(columns, split, strict=True)}
        user = self.user_tower(torch.cat(parts, dim=1))  # (B_RO, user_dim)
        vectors = {"user": user}
        if self.candidates:
            queries = self.queries(user).split(list(self.candidates.values()), dim=1)
            vectors |= {f"query.{name}": query for name, query in zip(self.candidates, queries, strict=True)}
        return UserState(vectors | {interest: interests[interest] for interest, _ in self.pairs})

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K); ``user`` is fanned out."""
        parts = [user.vectors["user"], symmetric_log(inputs.impression_dense), *inputs.impression_ids.values()]
        for name, candidate in self.matches:
            product = user.vectors[name] * inputs.impression_ids[candidate]  # (B_NRO, D)
            dot = product.sum(1, keepdim=True) / math.sqrt(product.shape[1])  # (B_NRO, 1)
            parts += [product, dot]
        return self.heads(self.tower(self.cross(torch.cat(parts, dim=1))))  # type: ignore[no-any-return]


class RankingModel(nn.Module):
    """Embedding tables (``sparse``) and towers (``dense``) of a ranking model.

    ``sparse_device``: where the tables are made, ``meta`` where TorchRec allocates them; set their weights by
    ``initialise_tables``. The dense part's initial weights come from torch's global random state alone,
    wherever the tables are: seed it before.
    """

    def __init__(self, schema: Schema, settings: Model, sparse_device: torch.device | None = None) -> None:
        super().__init__()
        self.schema = schema
        self.dense = RankingTowers(schema, settings)  # first: making tables on a real device draws random numbers
        self.sparse = EmbeddingLookup(schema, sparse_device)

    def forward(self, batch: RequestBatch) -> Tensor:
        """Logits (B_NRO, K) float32, a column per label in the schema's order, for a request batch or its
        impression-level form."""
        batch = without_future_events(batch, self.schema)
        return self.dense(model_inputs(self.schema, batch, self.sparse(batch)))  # type: ignore[no-any-return]

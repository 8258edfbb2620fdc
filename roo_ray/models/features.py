"""What the architectures have in common: features of a request, of a candidate, and their matches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.errors import ConfigError
from roo_ray.models.contract import ModelInputs
from roo_ray.models.interaction import symmetric_log
from roo_ray.models.jagged import segment_mean
from roo_ray.models.keyed_random import token_keys
from roo_ray.schema import Schema


def sequence_widths(schema: Schema) -> dict[str, dict[str, int]]:
    """Sequence -> id column -> embedding dim."""
    return {f.name: {c.column: schema.tables[c.table].dim for c in f.sequence_ids if c.table} for f in schema.sequences}


def candidate_widths(schema: Schema) -> dict[str, int]:
    """Impression-level id feature -> embedding dim."""
    return {f.name: schema.tables[f.table].dim for f in schema.select("impression", "ids") if f.table}


def shared_tables(schema: Schema) -> list[tuple[str, str]]:
    """(``sequence.column``, candidate feature) of every history column and candidate that read one table."""
    return [
        (f"{sequence.name}.{column.column}", candidate.name)
        for sequence in schema.sequences
        for column in sequence.sequence_ids
        for candidate in schema.select("impression", "ids")
        if candidate.table == column.table
    ]


def position_column(schema: Schema, settings: Model) -> int | None:
    """The place of ``position_feature`` in ``impression_dense``; None where it is not set.

    Raises ConfigError where the schema has no such impression-level dense column."""
    if settings.position_feature is None:
        return None
    columns = [column for f in schema.select("impression", "dense") for column in f.columns]
    if settings.position_feature not in columns:
        raise ConfigError(
            f"model.position_feature '{settings.position_feature}' is no impression-level dense column of schema "
            f"'{schema.name}' ({', '.join(columns) or 'it has none'})"
        )
    return columns.index(settings.position_feature)


class RequestFeatures(nn.Module):
    """Request-level features without the order of events: dense, ids, and per sequence the mean of its embeddings
    per id column (the user's interests: a bag of items, a bag of topics) and the number of events."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.columns = sequence_widths(schema)
        self.width = schema.dense_width("request")
        self.width += sum(schema.tables[f.table].dim for f in schema.select("request", "ids") if f.table)
        self.width += sum(sum(columns.values()) + 1 for columns in self.columns.values())

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(B_RO, width), and the interests: ``sequence.column`` -> (B_RO, D)."""
        parts = [symmetric_log(inputs.request_dense), *inputs.request_ids.values()]
        interests: dict[str, Tensor] = {}
        for name, columns in self.columns.items():
            sequence = inputs.sequences[name]
            ids = torch.cat([sequence.ids[column] for column in columns], dim=1)  # (T, sum of D)
            bags = segment_mean(ids, sequence.lengths)  # (B_RO, sum of D)
            parts += [bags, sequence.lengths.to(bags.dtype).log1p().unsqueeze(1)]
            split = bags.split(list(columns.values()), dim=1)
            interests |= {f"{name}.{column}": bag for column, bag in zip(columns, split, strict=True)}
        return torch.cat(parts, dim=1), interests


class CandidateFeatures(nn.Module):
    """Impression-level features, without the position where that is a debiasing feature."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        position = position_column(schema, settings)
        self.dense = [place for place in range(schema.dense_width("impression")) if place != position]
        self.all_dense = position is None
        self.width = len(self.dense) + sum(candidate_widths(schema).values())

    def forward(self, inputs: ModelInputs) -> Tensor:
        """(B_NRO, width)."""
        dense = inputs.impression_dense if self.all_dense else inputs.impression_dense[:, self.dense]
        return torch.cat([symmetric_log(dense), *inputs.impression_ids.values()], dim=1)


class Matches(nn.Module):
    """How a candidate matches its request, DLRM's explicit products: the elementwise and dot products of its
    embeddings with a projection of the user vector, and with the user's interests on the same table."""

    def __init__(self, schema: Schema, user_dim: int) -> None:
        super().__init__()
        self.candidates = candidate_widths(schema)
        self.interests = shared_tables(schema)
        self.pairs = [(f"query.{name}", name) for name in self.candidates] + self.interests
        self.width = sum(self.candidates[candidate] + 1 for _, candidate in self.pairs)
        self.queries = nn.Linear(user_dim, sum(self.candidates.values())) if self.candidates else None

    @torch.no_grad()
    def start_as_dots(self, linear: nn.Linear) -> None:
        """Initialises a linear map of the matches so that it gives the sum of all dot products, unscaled."""
        linear.weight.zero_()
        place = -1
        for _, candidate in self.pairs:
            place += self.candidates[candidate] + 1
            linear.weight[:, place] = math.sqrt(self.candidates[candidate])

    def user_vectors(self, user: Tensor, interests: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is needed of the user side: user (B_RO, user_dim) -> name -> (B_RO, D)."""
        vectors = {name: interests[name] for name, _ in self.interests}
        if self.queries is not None:
            queries = self.queries(user).split(list(self.candidates.values()), dim=1)
            vectors |= {f"query.{name}": query for name, query in zip(self.candidates, queries, strict=True)}
        return vectors

    def forward(self, vectors: dict[str, Tensor], inputs: ModelInputs) -> Tensor:
        """Fanned-out ``vectors`` -> (B_NRO, width)."""
        parts = [inputs.impression_dense[:, :0]]
        for name, candidate in self.pairs:
            product = vectors[name] * inputs.impression_ids[candidate]  # (B_NRO, D)
            parts += [product, product.sum(1, keepdim=True) / math.sqrt(product.shape[1])]
        return torch.cat(parts, dim=1)


def event_keys(inputs: ModelInputs, sequence: str) -> Tensor:
    """(T,) int64 keys of a sequence's events, for random choices."""
    return token_keys(inputs.request_key, inputs.sequences[sequence].lengths)

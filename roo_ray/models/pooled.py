"""Bags that are pooled where their table lies: one vector per bag comes back instead of one per id.

Tables that ``model.embeddings.pooled`` names are read by bags alone. They are TorchRec ``EmbeddingBagCollection``s, one
per embedding dim and level: at stride B_RO where bags of requests alone read a table, else at stride B_NRO, with empty
bags after those of requests. Collections sum; means are divided by the bag's length after it, so that features of one
table may be pooled in different ways and empty bags give 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, pad
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable, ShardingType
from torchrec.modules.embedding_configs import DataType, PoolingType

from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.models.jagged import mean_of_sums, segment_sum
from roo_ray.models.keyed import keyed_jagged
from roo_ray.models.precision import at_least_float32
from roo_ray.schema import Feature, Level, Schema

# what sums the ranks' parts of a bag by a reduce-scatter
_REDUCED = {ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value}


def bags_of(schema: Schema, table: str) -> list[Feature]:
    """The features that read ``table`` as bags, in the schema's order."""
    return [f for f in schema.features if f.kind == "ids" and f.table == table and f.pooling != "none"]


def pooled_levels(schema: Schema, pooled: Collection[str]) -> dict[str, Level]:
    """Pooled table -> the level at whose stride it is looked up, in the schema's order of tables: ``impression`` where
    any bag of impressions reads it."""
    levels: dict[str, Level] = {}
    for table in schema.tables:
        if table in pooled:
            of_impressions = any(f.level == "impression" for f in bags_of(schema, table))
            levels[table] = "impression" if of_impressions else "request"
    return levels


def pooled_problems(schema: Schema, pooled: Collection[str]) -> list[str]:
    """One line per table of ``pooled`` that something other than bags reads."""
    problems = []
    for table in dict.fromkeys(pooled):
        others = [
            f"the sequence '{f.name}' ({column.column})"
            for f in schema.sequences
            for column in f.sequence_ids
            if column.table == table
        ]
        others += [
            f"the feature '{f.name}', whose pooling is none"
            for f in schema.features
            if f.kind == "ids" and f.table == table and f.pooling == "none"
        ]
        if others:
            problems.append(
                f"model.embeddings.pooled names table '{table}', which is also read by {' and '.join(others)}: pooled "
                "tables are read by bags (pooling sum or mean) alone; take it out of pooled, or give the bags a table "
                "of their own"
            )
    return problems


def unpooled_name(parameter: str) -> str:
    """The name that what belongs to a pooled table would have were the table not pooled; other names as they are.
    Checkpoints hold tables by it, so that the same checkpoint fits both forms."""
    return _POOLED_NAME.sub(r"\1collections.\2.embeddings.", parameter)


_POOLED_NAME = re.compile(r"(\bsparse\.)pooled\.collections\.(dim_\d+)_(?:request|impression)\.embedding_bags\.")


class PooledLookup(nn.Module):
    """The collections of pooled tables. ``levels``: table -> the level of its stride.

    A lookup is begun by ``start`` and waited for in ``finish``, so that other lookups can be under way meanwhile.
    """

    def __init__(
        self, schema: Schema, pooled: Collection[str], device: torch.device | None = None, weights: str = "fp32"
    ) -> None:
        super().__init__()
        self.levels = pooled_levels(schema, pooled)
        by_stride: dict[str, list[EmbeddingBagConfig]] = {}
        self.means: set[str] = set()
        for table, level in self.levels.items():
            bags = bags_of(schema, table)
            self.means.update(f.name for f in bags if f.pooling == "mean")
            by_stride.setdefault(f"dim_{schema.tables[table].dim}_{level}", []).append(
                EmbeddingBagConfig(
                    name=table,
                    embedding_dim=schema.tables[table].dim,
                    num_embeddings=schema.tables[table].rows,
                    feature_names=[f.name for f in bags],
                    data_type=DataType[weights.upper()],
                    pooling=PoolingType.SUM,
                )
            )
        self.features = {
            name: [feature for table in tables for feature in table.feature_names] for name, tables in by_stride.items()
        }
        self.collections = nn.ModuleDict(
            {name: EmbeddingBagCollection(tables=tables, device=device) for name, tables in by_stride.items()}
        )

    def start(self, batch: RequestBatch) -> dict[str, Awaitable[KeyedTensor] | KeyedTensor]:
        """Begins the lookups (collective where tables are sharded)."""
        strides = self._strides(batch)
        bags = batch.request_ids | batch.impression_ids
        begun = {}
        for name, collection in self.collections.items():
            stride = strides[name.rpartition("_")[2]]
            lists = {f: Jagged(bags[f].values, _with_empty(bags[f].lengths, stride)) for f in self.features[name]}
            keyed = keyed_jagged(lists, self.features[name])
            begun[name] = _sum_halves(collection, keyed) if _rounds(collection) else collection(keyed)
        return begun

    def finish(self, begun: dict[str, Awaitable[KeyedTensor] | KeyedTensor], batch: RequestBatch) -> dict[str, Tensor]:
        """Feature -> its pooled embeddings, (B_RO, D) of a request-level, (B_NRO, D) of an impression-level feature,
        float32; empty bags 0."""
        bags = batch.request_ids | batch.impression_ids
        found: dict[str, Tensor] = {}
        for result in begun.values():
            sums: KeyedTensor = result.wait() if isinstance(result, Awaitable) else result
            for feature, values in sums.to_dict().items():
                lengths = bags[feature].lengths
                rows = at_least_float32(values[: lengths.numel()])
                found[feature] = mean_of_sums(rows, lengths) if feature in self.means else rows
        return found

    def _strides(self, batch: RequestBatch) -> dict[str, int]:
        """Level -> bags in its lookup. gloo's reduce-scatter, which adds up the ranks' parts of row-wise tables' bags,
        wants as many on every rank: those of the largest batch then (collective)."""
        rows = {"request": batch.num_requests, "impression": batch.total_impressions}
        if any(_reduced_by_gloo(collection) for collection in self.collections.values()):
            largest = torch.tensor(list(rows.values()))
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            return dict(zip(rows, largest.tolist(), strict=True))
        return rows


def _with_empty(lengths: Tensor, rows: int) -> Tensor:
    """Lengths (B,) of bags, followed by empty ones up to so many: (rows,)."""
    return pad(lengths, (0, rows - lengths.numel()))


def _rounds(collection: nn.Module) -> bool:
    """torch's own bags of weights of half precision are rounded to it; those of sharded tables are float32."""
    weights = collection.parameters() if isinstance(collection, EmbeddingBagCollection) else []
    return any(weight.dtype in (torch.float16, torch.bfloat16) for weight in weights)


def _sum_halves(collection: EmbeddingBagCollection, bags: KeyedJaggedTensor) -> KeyedTensor:
    """The collection's sums in float32."""
    keys, sums = [], []
    for table in collection.embedding_bag_configs():
        weight = collection.embedding_bags[table.name].weight
        for name in table.feature_names:
            keys.append(name)
            sums.append(segment_sum(embedding(bags[name].values(), weight), bags[name].lengths()))
    return KeyedTensor(keys, [values.shape[1] for values in sums], torch.cat(sums, dim=1))


def _reduced_by_gloo(collection: nn.Module) -> bool:
    if not isinstance(collection, ShardedEmbeddingBagCollection) or dist.get_backend() != "gloo":
        return False
    return any(table.sharding_type in _REDUCED for table in collection.module_sharding_plan.values())

"""Embedding lookup at stride B_RO: history and candidate ids in one lookup per embedding dim.

Every id feature goes into the lookup as one list per request, also those of impressions (their ids, grouped by
request): one lookup and one all-to-all serve the user side and the impression side, and a table that both read
is one table. Bags are pooled after the lookup, but for those of tables that are to be pooled where they lie
(``pooled``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_configs import DataType

from roo_ray.config import ManagedRows
from roo_ray.errors import ConfigError
from roo_ray.ingest.batch import Jagged, RequestBatch, impression_id_keys, request_id_keys
from roo_ray.models.contract import ModelInputs, SequenceInputs
from roo_ray.models.jagged import segment_mean, segment_sum, sum_lengths
from roo_ray.models.keyed import keyed_jagged
from roo_ray.models.keyed_random import combine_keys
from roo_ray.models.managed import ManagedIds
from roo_ray.models.pooled import PooledLookup, pooled_problems
from roo_ray.models.precision import at_least_float32
from roo_ray.schema import Feature, Schema


def lookup_features(schema: Schema) -> dict[str, list[str]]:
    """Table -> names of the features that read it in the lookup: the keys of ``RequestBatch.request_ids`` and
    ``impression_ids``. Tables in the schema's order, without those that nothing reads.

    Raises ConfigError for names that the lookup cannot tell apart or TorchRec cannot hold.
    """
    keys = request_id_keys(schema) + impression_id_keys(schema)
    twice = sorted(key for key, count in Counter(key for key, _ in keys).items() if count > 1)
    if twice:
        raise ConfigError(f"schema '{schema.name}': id column {twice[0]} is given twice; name it once")
    features = {table: [key for key, of in keys if of == table] for table in schema.tables}
    dotted = sorted(table for table, names in features.items() if names and "." in table)
    if dotted:
        raise ConfigError(f"schema '{schema.name}': table '{dotted[0]}' has a dot in its name; rename it")
    return {table: names for table, names in features.items() if names}


@dataclass(frozen=True)
class LookedUp:
    """Embeddings of a batch, by the feature's name in the lookup, float32.

    per_id  (T, D) in the order of the feature's ids, with lengths (B_RO,) for request-level and (B_NRO,) for
            impression-level features.
    pooled  (B_RO, D) or (B_NRO, D): bags of pooled tables.
    """

    per_id: dict[str, Jagged]
    pooled: dict[str, Tensor]


class EmbeddingLookup(nn.Module):
    """The model's embedding tables: one TorchRec ``EmbeddingCollection`` per embedding dim, and those that ``pooled``
    names in ``EmbeddingBagCollection``s.

    ``device``: where the tables are made; ``meta`` where ``DistributedModelParallel`` allocates them. Works
    unsharded and sharded. Weights are set by ``initialise_tables``; they are of type ``weights`` (fp32, fp16,
    bf16), what is looked up is float32. ``managed``: how the ids of managed tables get rows, by maps on ``ids_device``
    (by default ``device``, where it is real). Raises ConfigError where ``pooled`` names a table that is read by
    something other than bags.
    """

    def __init__(
        self,
        schema: Schema,
        device: torch.device | None = None,
        weights: str = "fp32",
        pooled: Collection[str] = (),
        managed: ManagedRows | None = None,
        ids_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        problems = pooled_problems(schema, pooled)
        if problems:
            raise ConfigError("\n  ".join(problems))
        by_dim: dict[int, list[EmbeddingConfig]] = {}
        features = lookup_features(schema)
        for table, names in features.items():
            if table in pooled:
                continue
            rows, dim = schema.tables[table].rows, schema.tables[table].dim
            by_dim.setdefault(dim, []).append(
                EmbeddingConfig(
                    name=table,
                    embedding_dim=dim,
                    num_embeddings=rows,
                    feature_names=names,
                    data_type=DataType[weights.upper()],
                )
            )
        self.features = {
            f"dim_{dim}": [name for table in tables for name in table.feature_names] for dim, tables in by_dim.items()
        }
        self.collections = nn.ModuleDict(
            {f"dim_{dim}": EmbeddingCollection(tables=tables, device=device) for dim, tables in by_dim.items()}
        )
        self.pooled = PooledLookup(schema, features.keys() & pooled, device, weights)
        made = None if device is not None and device.type == "meta" else device  # maps are no weights: nobody sets them
        self.managed = ManagedIds(schema, managed or ManagedRows(), ids_device or made)

    def forward(self, batch: RequestBatch) -> LookedUp:
        """The embeddings of all id features (collective where tables are sharded)."""
        batch = self.managed(batch)
        per_request = request_lists(batch)
        # all lookups are under way before the first one is waited for
        started = {
            name: collection(keyed_jagged(per_request, self.features[name]))
            for name, collection in self.collections.items()
        }
        bags = self.pooled.start(batch)
        found: dict[str, Tensor] = {}
        for result in started.values():
            tensors: dict[str, JaggedTensor] = result.wait() if isinstance(result, Awaitable) else result
            found.update({key: at_least_float32(jagged.values()) for key, jagged in tensors.items()})
        ids = batch.request_ids | batch.impression_ids
        per_id = {key: Jagged(values, ids[key].lengths) for key, values in found.items()}
        return LookedUp(per_id, self.pooled.finish(bags, batch))


def request_lists(batch: RequestBatch) -> dict[str, Jagged]:
    """Every id feature as one list of ids per request, lengths (B_RO,): a request's impression-level ids are
    its impressions' lists, one after the other."""
    lists = dict(batch.request_ids)
    for name, ids in batch.impression_ids.items():
        lists[name] = Jagged(ids.values, sum_lengths(ids.lengths, batch.num_impressions))
    return lists


def without_future_events(batch: RequestBatch, schema: Schema) -> RequestBatch:
    """The batch without history events at or after their request's time, which would leak the future into the
    user side. Sequences without a time stay as they are. Ids and times only; nothing is looked up yet."""
    request_ids, sequence_dense = dict(batch.request_ids), dict(batch.sequence_dense)
    sequence_time = dict(batch.sequence_time)
    for feature in schema.sequences:
        if not feature.time:
            continue
        times, keys = sequence_time[feature.name], _id_keys(feature)
        lengths = request_ids[keys[0]].lengths  # (B_RO,)
        known = times < torch.repeat_interleave(batch.request_time, lengths, output_size=times.numel())  # (T,)
        if bool(known.all()):
            continue
        kept = segment_sum(known.double().unsqueeze(1), lengths).squeeze(1).long()  # (B_RO,)
        for key in keys:
            request_ids[key] = Jagged(request_ids[key].values[known], kept)
        sequence_dense[feature.name] = sequence_dense[feature.name][known]
        sequence_time[feature.name] = times[known]
    return replace(batch, request_ids=request_ids, sequence_dense=sequence_dense, sequence_time=sequence_time)


def model_inputs(schema: Schema, batch: RequestBatch, embeddings: LookedUp) -> ModelInputs:
    """The batch with its looked-up ``embeddings`` as plain tensors; bags that are not pooled yet are pooled here."""
    per_id, sequences = embeddings.per_id, {}

    def pooled(feature: Feature) -> Tensor:
        ready = embeddings.pooled.get(feature.name)
        return pool(per_id[feature.name], feature) if ready is None else ready

    for feature in schema.sequences:
        keys = _id_keys(feature)
        lengths = per_id[keys[0]].lengths  # (B_RO,)
        ages = None
        if feature.time:
            times = batch.sequence_time[feature.name]  # (T,) float64
            asked = torch.repeat_interleave(batch.request_time, lengths, output_size=times.numel())
            ages = (asked - times).float()  # (T,)
        sequences[feature.name] = SequenceInputs(
            ids={c.column: per_id[k].values for c, k in zip(feature.sequence_ids, keys, strict=True)},
            dense=batch.sequence_dense[feature.name],
            ages=ages,
            lengths=lengths,
        )
    return ModelInputs(
        num_impressions=batch.num_impressions,
        request_dense=batch.request_dense,
        impression_dense=batch.impression_dense,
        request_ids={f.name: pooled(f) for f in schema.select("request", "ids")},
        sequences=sequences,
        impression_ids={f.name: pooled(f) for f in schema.select("impression", "ids")},
        request_key=batch.request_key,
        impression_key=combine_keys(batch.request_key[batch.request_of_impression()], batch.impression_index),
        impression_real=(batch.weights > 0).any(dim=1),
    )


def pool(embeddings: Jagged, feature: Feature) -> Tensor:
    """One embedding per row, by the feature's pooling: (T, D) with lengths (B,) -> (B, D); empty bags: 0."""
    if feature.pooling == "sum":
        return segment_sum(embeddings.values, embeddings.lengths)
    if feature.pooling == "mean":
        return segment_mean(embeddings.values, embeddings.lengths)
    return embeddings.values


def _id_keys(sequence: Feature) -> list[str]:
    return [f"{sequence.name}.{column.column}" for column in sequence.sequence_ids]

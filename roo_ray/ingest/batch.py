"""RequestBatch: what a model sees of a step. Tensors only; the semantics of every field are stated here once.

Level of a field: B_RO rows (requests), B_NRO rows (impressions, ``B_NRO == num_impressions.sum()``, grouped by
request, in request order) or T values (jagged, split by lengths). ``map`` serves ``to``, ``pin_memory`` and
``record_stream``; ``explode`` gives the impression-level form of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from roo_ray.schema import Schema


def segment_positions(lengths: Tensor) -> Tensor:
    """Position of each value within its segment: lengths (B,) int64 -> (sum(lengths),) int64."""
    starts = lengths.cumsum(0) - lengths  # (B,)
    total = int(lengths.sum())
    return torch.arange(total, device=lengths.device) - torch.repeat_interleave(starts, lengths, output_size=total)


@dataclass(frozen=True)
class Jagged:
    """Lists of unequal length: ``values`` (T,) or (T, C), ``lengths`` (B,) int64, ``lengths.sum() == T``."""

    values: Tensor
    lengths: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Jagged:
        """Applies a function to both tensors."""
        return Jagged(function(self.values), function(self.lengths))

    def index_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """((T',) int64 into ``values``, (N,) lengths) of the lists of the given rows; rows (N,) int64."""
        lengths = self.lengths[rows]  # (N,)
        total = int(lengths.sum())
        shift = (self.lengths.cumsum(0) - self.lengths)[rows] - (lengths.cumsum(0) - lengths)  # (N,) from there to here
        index = torch.repeat_interleave(shift, lengths, output_size=total)
        return index.add_(torch.arange(total, device=index.device)), lengths

    def take(self, rows: Tensor) -> Jagged:
        """The lists of the given rows, in that order; rows (N,) int64 may repeat."""
        index, lengths = self.index_of(rows)
        return Jagged(self.values.index_select(0, index), lengths)

    @staticmethod
    def concat(parts: Sequence[Jagged]) -> Jagged:
        """The lists of all parts, one after the other."""
        return Jagged(torch.cat([p.values for p in parts]), torch.cat([p.lengths for p in parts]))


@dataclass(frozen=True)
class RequestBatch:
    """A batch of requests with their impressions. Dict keys are fixed by the schema (see each field).

    num_impressions   (B_RO,) int64, at least 1.
    request_key       (B_RO,) int64: stable hash of the request key; names the request in audits, and keys
                      random choices.
    impression_index  (B_NRO,) int64: the impression's position within its request as stored; kept by
                      ``explode``, so random choices do not depend on the form of the batch.
    user_key          (B_RO,) int64: stable hash of the user; of a null user the request's key, so that anonymous
                      requests are not of one user.
    request_time      (B_RO,) float64, seconds since the epoch (UTC).
    request_dense     (B_RO, D_r) float32: the request-level dense columns in the schema's order.
    impression_dense  (B_NRO, D_n) float32.
    request_ids       request-level ids, one Jagged of int64 ids per id column, lengths (B_RO,): features of
                      kind ids under their name, sequence id columns under ``feature.column``.
    sequence_dense    sequence name -> (T, C) float32, the dense sequence columns in order (C may be 0); T is
                      that of the sequence's id columns.
    sequence_time     sequence name -> (T,) float64, seconds since the epoch; only sequences with a time.
    impression_ids    impression-level ids: feature name -> Jagged, lengths (B_NRO,) (all 1 for pooling none).
    labels            (B_NRO, K) float32, 0 where unknown.
    weights           (B_NRO, K) float32: 1 where the label is known, 0 where it is null; all 0 for a dummy
                      request. (A task's weight in the loss is the schema's; it is not in here.)
    oracle            (B_NRO, K) float32 true probabilities, NaN where the schema names none.
    split             (B_RO,) int64: 0 a whole request, 1 the first part of one that was split over the budget, 2 a
                      later part. Parts have the request's key and user side; what is computed per request skips
                      them. None where no request can be split.
    """

    num_impressions: Tensor
    request_key: Tensor
    impression_index: Tensor
    user_key: Tensor
    request_time: Tensor
    request_dense: Tensor
    impression_dense: Tensor
    request_ids: dict[str, Jagged]
    sequence_dense: dict[str, Tensor]
    sequence_time: dict[str, Tensor]
    impression_ids: dict[str, Jagged]
    labels: Tensor
    weights: Tensor
    oracle: Tensor
    split: Tensor | None = None

    @property
    def num_requests(self) -> int:
        """B_RO."""
        return self.num_impressions.numel()

    @property
    def total_impressions(self) -> int:
        """B_NRO."""
        return self.labels.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> RequestBatch:
        """A batch with ``function`` applied to every tensor."""
        mapped: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                mapped[field.name] = {
                    k: v.map(function) if isinstance(v, Jagged) else function(v) for k, v in value.items()
                }
            else:
                mapped[field.name] = None if value is None else function(value)
        return RequestBatch(**mapped)  # type: ignore[arg-type]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RequestBatch:
        """The batch on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RequestBatch:
        """The batch in page-locked host memory, for asynchronous copies to a GPU."""
        return self.map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Marks every tensor as used by ``stream``."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self.map(record)

    def request_of_impression(self) -> Tensor:
        """(B_NRO,) int64: the batch row of each impression's request."""
        rows = torch.arange(self.num_requests, device=self.num_impressions.device)
        return torch.repeat_interleave(rows, self.num_impressions, output_size=self.total_impressions)

    def explode(self) -> RequestBatch:
        """The impression-level form: every impression a request of its own, user side repeated."""
        rows = self.request_of_impression()  # (B_NRO,)
        chosen: dict[str, tuple[Tensor, Tensor]] = {}  # the columns of a sequence are aligned: one index for all
        for name, ids in self.request_ids.items():
            if name.split(".")[0] not in chosen:
                chosen[name.split(".")[0]] = ids.index_of(rows)

        def take(name: str, values: Tensor) -> Tensor:
            return values.index_select(0, chosen[name.split(".")[0]][0])

        return RequestBatch(
            num_impressions=torch.ones_like(rows),
            request_key=self.request_key[rows],
            impression_index=self.impression_index,
            user_key=self.user_key[rows],
            request_time=self.request_time[rows],
            request_dense=self.request_dense[rows],
            impression_dense=self.impression_dense,
            request_ids={
                name: Jagged(take(name, ids.values), chosen[name.split(".")[0]][1])
                for name, ids in self.request_ids.items()
            },
            sequence_dense={name: take(name, values) for name, values in self.sequence_dense.items()},
            sequence_time={name: take(name, values) for name, values in self.sequence_time.items()},
            impression_ids=self.impression_ids,
            labels=self.labels,
            weights=self.weights,
            oracle=self.oracle,
            split=None if self.split is None else self.split[rows],
        )

    @staticmethod
    def concat(parts: Sequence[RequestBatch]) -> RequestBatch:
        """One batch of the requests of all parts, in order. At least one part."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, object] = {}
        for field in fields(RequestBatch):
            values = [getattr(part, field.name) for part in parts]
            first = values[0]
            if field.name == "split":
                marks = [torch.zeros_like(p.num_impressions) if p.split is None else p.split for p in parts]
                joined["split"] = torch.cat(marks) if any(v is not None for v in values) else None
            elif isinstance(first, dict):
                joined[field.name] = {
                    key: Jagged.concat([v[key] for v in values])
                    if isinstance(first[key], Jagged)
                    else torch.cat([v[key] for v in values])
                    for key in first
                }
            else:
                joined[field.name] = torch.cat(values)
        return RequestBatch(**joined)  # type: ignore[arg-type]


def request_id_keys(schema: Schema) -> list[tuple[str, str]]:
    """(key of ``RequestBatch.request_ids``, table) of every request-level id column, in a fixed order."""
    keys: list[tuple[str, str]] = []
    for feature in schema.features:
        if feature.level == "request" and feature.kind == "ids" and feature.table:
            keys.append((feature.name, feature.table))
        elif feature.kind == "sequence":
            keys += [(f"{feature.name}.{c.column}", c.table) for c in feature.sequence_ids if c.table]
    return keys


def impression_id_keys(schema: Schema) -> list[tuple[str, str]]:
    """(key of ``RequestBatch.impression_ids``, table) of every impression-level id feature."""
    return [(f.name, f.table) for f in schema.select("impression", "ids") if f.table]


def dummy_batch(schema: Schema) -> RequestBatch:
    """One request with one impression of weight 0 and empty lists: what a lane without data delivers.

    TorchRec cannot take a rank with no rows; this row has no weight in the loss, no gradient and is seen by no
    metric (``weights`` is 0 for every task).
    """
    tasks = len(schema.labels)
    empty_ids = Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    one_id = Jagged(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    single = {f.name for f in schema.features if f.kind == "ids" and f.pooling == "none"}
    return RequestBatch(
        num_impressions=torch.ones(1, dtype=torch.int64),
        request_key=torch.zeros(1, dtype=torch.int64),
        impression_index=torch.zeros(1, dtype=torch.int64),
        user_key=torch.zeros(1, dtype=torch.int64),
        request_time=torch.zeros(1, dtype=torch.float64),
        request_dense=torch.zeros(1, schema.dense_width("request")),
        impression_dense=torch.zeros(1, schema.dense_width("impression")),
        request_ids={key: one_id if key in single else empty_ids for key, _ in request_id_keys(schema)},
        sequence_dense={f.name: torch.zeros(0, len(f.sequence_dense)) for f in schema.sequences},
        sequence_time={f.name: torch.zeros(0, dtype=torch.float64) for f in schema.sequences if f.time},
        impression_ids={key: one_id if key in single else empty_ids for key, _ in impression_id_keys(schema)},
        labels=torch.zeros(1, tasks),
        weights=torch.zeros(1, tasks),
        oracle=torch.full((1, tasks), float("nan")),
    )

"""Packed batches become tensors: every field of a batch is a view of the Arrow buffer that it lies in.

Nothing is copied and nothing runs per row: DLPack hands each child buffer to torch, and a batch is one slice of
each. The buffers may be shared memory of Ray's object store, so the tensors must not be written to.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from roo_ray.ingest.batch import Jagged, RequestBatch, impression_id_keys, request_id_keys
from roo_ray.ingest.pack import COUNTS, TAGS
from roo_ray.schema import Schema


class PackedBatches:
    """The batches of a packed window (``pack.py``): ``tags`` and ``counts`` are its columns of one value per batch,
    ``skipped_units`` the places of its units that could not be read, ``batch(row)`` its batches."""

    def __init__(self, table: pa.Table, schema: Schema) -> None:
        table = table.combine_chunks()  # no copy where Ray delivers a block in one piece
        self.schema = schema
        self.rows = table.num_rows
        self.tags: dict[str, npt.NDArray[np.int64]] = {tag: table.column(tag).to_numpy() for tag in TAGS}
        self.counts: dict[str, list[float]] = {name: table.column(name).to_numpy().tolist() for name in COUNTS}
        self._single = {f.name for f in schema.features if f.kind == "ids" and f.pooling == "none"}
        self._values: dict[str, Tensor] = {}
        self._offsets: dict[str, list[int]] = {}
        for name in table.column_names:
            if name not in self.tags and name not in self.counts:
                lists = table.column(name).chunk(0)
                self._values[name] = torch.from_dlpack(lists.values)
                self._offsets[name] = lists.offsets.to_numpy().tolist()
        self.skipped_units: tuple[int, ...] = tuple(self._flat("skipped_units", 0).tolist())
        longest = [max(np.diff(self._offsets[name]), default=0) for name in ("num_impressions", "impression_index")]
        self._ones = torch.ones(int(max(longest, default=0)), dtype=torch.int64)

    def _flat(self, name: str, row: int) -> Tensor:
        offsets = self._offsets[name]
        return self._values[name][offsets[row] : offsets[row + 1]]

    def _wide(self, name: str, row: int, rows: int, width: int) -> Tensor:
        return self._flat(name, row).view(rows, width) if width else torch.zeros(rows, 0)

    def batch(self, row: int) -> RequestBatch:
        """The batch in a row of the table; its tensors are views of the table's buffers."""
        schema = self.schema
        num_impressions = self._flat("num_impressions", row)  # (B_RO,)
        requests, tasks = len(num_impressions), len(schema.labels)
        labels = self._flat("labels", row).view(-1, tasks)  # (B_NRO, K)
        impressions = len(labels)

        def ids(key: str, rows: int) -> Jagged:
            values = self._flat(f"ids:{key}", row)  # (T,)
            if key in self._single:
                return Jagged(values, self._ones[:rows])
            return Jagged(values, self._flat(f"lengths:{key.split('.')[0]}", row))

        def sequence_dense(name: str, width: int) -> Tensor:
            tokens = int(self._flat(f"lengths:{name}", row).sum())
            return self._wide(f"sequence_dense:{name}", row, tokens, width)  # (T, C)

        return RequestBatch(
            num_impressions=num_impressions,
            request_key=self._flat("request_key", row),
            impression_index=self._flat("impression_index", row),
            user_key=self._flat("user_key", row),
            request_time=self._flat("request_time", row),
            request_dense=self._wide("request_dense", row, requests, schema.dense_width("request")),
            impression_dense=self._wide("impression_dense", row, impressions, schema.dense_width("impression")),
            request_ids={key: ids(key, requests) for key, _ in request_id_keys(schema)},
            sequence_dense={f.name: sequence_dense(f.name, len(f.sequence_dense)) for f in schema.sequences},
            sequence_time={f.name: self._flat(f"sequence_time:{f.name}", row) for f in schema.sequences if f.time},
            impression_ids={key: ids(key, impressions) for key, _ in impression_id_keys(schema)},
            labels=labels,
            weights=self._flat("weights", row).view(-1, tasks),
            oracle=self._flat("oracle", row).view(-1, tasks)
            if "oracle" in self._values
            else torch.full((impressions, tasks), float("nan")),
            split=self._flat("split", row) if "split" in self._values else None,
        )

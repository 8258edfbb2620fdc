"""The index of item vectors of a retrieval model: the item tower over every item of a data set, in one process."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from roo_ray.config import Config, Embeddings, Holdout, Model
from roo_ray.errors import ConfigError
from roo_ray.ingest.columns import plain_values
from roo_ray.ingest.pack import pack_rows
from roo_ray.ingest.settings import StreamSettings
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.ingest.window import WindowRows, take
from roo_ray.models.item_index import ItemIndex, ItemVectors
from roo_ray.models.managed import managed_ids
from roo_ray.models.objective import retrieval_towers
from roo_ray.models.ranking import RankingModel
from roo_ray.requests.manifest import load_manifest
from roo_ray.schema import Schema
from roo_ray.storage import open_filesystem
from roo_ray.training import checkpoint
from roo_ray.training.progress import Say

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExportedItems:
    """What was written: items and floats of each, from so many requests and impressions. ``sharing``: items whose row
    of the table is another item's too."""

    path: str
    items: int
    sharing: int
    dim: int
    requests: int
    impressions: int


def export_items(config: Config, named: str, path: str, say: Say) -> ExportedItems:
    """Writes the vectors of all items of the config's data set, as columns ``item`` (the data set's own id), ``row``
    (of the item's table; of a managed table the id's hash) and ``vector`` of a Parquet file at ``path`` (local or URI),
    which appears whole or not at all. A null id is an item without one.

    ``named``: a retrieval checkpoint's path or URI. An item whose features vary over impressions has the vector of
    the last of them in stored order. Needs memory for the tables and the index, and no Ray.
    Raises ConfigError where the checkpoint is of another kind of model, DataError where it or the data is broken.
    """
    with checkpoint.open_checkpoint(named).as_directory() as folder:
        state = checkpoint.read_state(folder)
        if state.model.kind != "retrieval" or state.model.towers is not None:
            kind = state.model.towers or state.model.kind
            raise ConfigError(f"{named} is a model of kind '{kind}': item vectors are of kind retrieval alone")
        manifest = load_manifest(config.requests, config.requests_version)
        schema = state.request_schema()
        settings = StreamSettings(
            data_set=config.requests,
            version=manifest.version,
            schema=schema,
            ingest=config.ingest.model_copy(update={"reader": "thread", "lanes": 1}),
            holdout=Holdout(by="all"),
            side="evaluation",
            seed=0,
            epochs=(0,),
            mode="sequential",
        )
        model = _whole_model(folder, schema, state.model)
        index, requests, impressions = _index(model, settings, say)
    _write(index, path)
    return ExportedItems(path, len(index.ids), _sharing(model, index), index.vectors.shape[1], requests, impressions)


def _whole_model(folder: str | Path, schema: Schema, settings: Model) -> RankingModel:
    """The model of a checkpoint on CPU, its tables whole and float32: however they were stored, placed and updated in
    training, which may be in ways that a GPU alone can do."""
    tables = Embeddings(managed=settings.embeddings.managed)
    model = RankingModel(schema, settings.model_copy(update={"embeddings": tables}))
    tensors = {"model": dict(model.state_dict())}
    misfit, reader = f"checkpoint {folder} does not fit its own model", checkpoint.SafeReader(folder)
    checkpoint.read_tensors(tensors, reader, checkpoint.read_state(folder), misfit, alone=True)
    model.load_state_dict(tensors["model"])
    return model.eval()


class _OwnIds:
    """The data set's own ids of items, numbered as they come, and the row of each in the item's table."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._parts: list[pa.Array] = []
        self._rows: list[Integers] = []

    def numbers(self, items: pa.Array, rows: Integers) -> torch.Tensor:
        """items (N,), which may be null, their rows (N,) -> the items' numbers (N,) int64."""
        encoded = pc.dictionary_encode(items, null_encoding="encode")
        places = encoded.indices.to_numpy()
        first = np.unique(places, return_index=True)[1]
        known = len(self._numbers)
        numbers = [self._numbers.setdefault(item, len(self._numbers)) for item in encoded.dictionary.to_pylist()]
        own = np.array(numbers, np.int64)
        if (own >= known).any():
            self._parts.append(encoded.dictionary.filter(pa.array(own >= known)))
            self._rows.append(rows[first][own >= known])
        return torch.from_numpy(own[places])

    def all(self) -> tuple[pa.Array, Integers]:
        """(ids, their rows) of all items, by number."""
        parts = [pa.table({"item": part}) for part in self._parts]
        column = pa.concat_tables(parts, promote_options="permissive").column("item")
        return column.combine_chunks(), np.concatenate(self._rows)


def _index(model: RankingModel, settings: StreamSettings, say: Say) -> tuple[ItemIndex, int, int]:
    towers = retrieval_towers(model)
    assert towers is not None
    column = next(feature.columns[0] for feature in settings.schema.features if feature.name == towers.item)
    vectors, own = ItemVectors(), _OwnIds()
    requests = impressions = skipped = 0
    packing, plans = settings.open()
    for window in plans.reading_order([0], None):
        read = WindowRows(packing, window)
        skipped += read.skipped
        if not len(read.rows):
            continue
        packed = PackedBatches(pack_rows(read), settings.schema)
        batches = [packed.batch(row) for row in range(packed.rows)]
        stored = plain_values(take(*read.impressions(column)))
        rows = torch.cat([batch.impression_ids[towers.item].values for batch in batches]).numpy()
        numbers = own.numbers(stored, rows).split([batch.total_impressions for batch in batches])
        for batch, items in zip(batches, numbers, strict=True):
            requests, impressions = requests + batch.num_requests, impressions + batch.total_impressions
            with torch.no_grad():
                known = vectors.add(items, model(batch).float().chunk(2, dim=1)[1])
            if known is not None:
                say(f"{requests:,} requests read, {known:,} items")
    if skipped:
        say(f"{skipped:,} requests of shards that cannot be read were skipped (ingest.on_bad_shard)")
    ids, rows = own.all()
    order = pc.sort_indices(ids)
    by_number = vectors.index()
    places = torch.from_numpy(order.to_numpy().astype(np.int64))
    index = ItemIndex(
        torch.from_numpy(rows)[places], by_number.vectors[places], ids.take(order), towers.item_fingerprint()
    )
    return index, requests, impressions


def _sharing(model: RankingModel, index: ItemIndex) -> int:
    """Items of the index whose row of the table is another item's too: ids that collide in a hashed table, ids without
    a row of their own in a managed one."""
    towers, managed = retrieval_towers(model), managed_ids(model)
    assert towers is not None
    if managed is not None and towers.table in managed.features:
        of = managed.table(towers.table)
        return int((of.rows(index.ids) == of.num_rows - 1).sum())
    counts = index.ids.unique(return_counts=True)[1]
    return int(counts[counts > 1].sum())


def _write(index: ItemIndex, path: str) -> None:
    filesystem, inner = open_filesystem(path)
    filesystem.create_dir(os.path.dirname(inner), recursive=True)
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "items.parquet")
        content = (Path(folder) / "items.parquet").read_bytes()
    with filesystem.open_output_stream(f"{inner}.writing") as stream:
        stream.write(content)
    filesystem.move(f"{inner}.writing", inner)

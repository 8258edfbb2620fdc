"""The index of item vectors of a retrieval model: the item tower over every item of a data set, in one process."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from roo_ray.config import Config, Embeddings, Holdout, Model
from roo_ray.errors import ConfigError
from roo_ray.ingest.stream import RankStream, StreamSettings
from roo_ray.models.item_index import ItemIndex
from roo_ray.models.objective import retrieval_towers
from roo_ray.models.ranking import RankingModel
from roo_ray.requests.manifest import load_manifest
from roo_ray.schema import Schema
from roo_ray.storage import open_filesystem
from roo_ray.training import checkpoint
from roo_ray.training.progress import Say

MERGE_AT = 1 << 20  # vectors held before those of one item are made one


@dataclass(frozen=True)
class ExportedItems:
    """What was written: items and floats of each, from so many requests and impressions."""

    path: str
    items: int
    dim: int
    requests: int
    impressions: int


def export_items(config: Config, named: str, path: str, say: Say) -> ExportedItems:
    """Writes the vectors of all items of the config's data set, as columns ``item`` and ``vector`` of a Parquet
    file at ``path`` (local or URI), which appears whole or not at all.

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
        index, requests, impressions = _index(model, RankStream(settings, 0, 1), say)
    _write(index, path)
    return ExportedItems(path, len(index.ids), index.vectors.shape[1], requests, impressions)


def _whole_model(folder: str | Path, schema: Schema, settings: Model) -> RankingModel:
    """The model of a checkpoint on CPU, its tables whole and float32: however they were stored, placed and updated in
    training, which may be in ways that a GPU alone can do."""
    model = RankingModel(schema, settings.model_copy(update={"embeddings": Embeddings()}))
    tensors = {"model": dict(model.state_dict())}
    misfit, reader = f"checkpoint {folder} does not fit its own model", checkpoint.SafeReader(folder)
    checkpoint.read_tensors(tensors, reader, checkpoint.read_state(folder), misfit, alone=True)
    model.load_state_dict(tensors["model"])
    return model.eval()


def _index(model: torch.nn.Module, stream: RankStream, say: Say) -> tuple[ItemIndex, int, int]:
    towers = retrieval_towers(model)
    assert towers is not None
    ids: list[torch.Tensor] = []
    vectors: list[torch.Tensor] = []
    requests = impressions = merge_at = 0
    try:
        with torch.no_grad():
            for step in stream.epoch(0):
                if not step.lanes_alive:
                    break
                ids.append(step.batch.impression_ids[towers.item].values)
                vectors.append(model(step.batch).float().chunk(2, dim=1)[1])
                requests, impressions = requests + step.requests, impressions + step.impressions
                if sum(map(len, ids)) > max(merge_at, MERGE_AT):
                    merged = ItemIndex.of(torch.cat(ids), torch.cat(vectors))
                    ids, vectors = [merged.ids], [merged.vectors]
                    merge_at = 2 * len(merged.ids)  # a catalogue larger than MERGE_AT is not merged at every step
                    say(f"{requests:,} requests read, {len(merged.ids):,} items")
    finally:
        stream.close()
    return ItemIndex.of(torch.cat(ids), torch.cat(vectors)), requests, impressions


def _write(index: ItemIndex, path: str) -> None:
    filesystem, inner = open_filesystem(path)
    filesystem.create_dir(os.path.dirname(inner), recursive=True)
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "items.parquet")
        content = (Path(folder) / "items.parquet").read_bytes()
    with filesystem.open_output_stream(f"{inner}.writing") as stream:
        stream.write(content)
    filesystem.move(f"{inner}.writing", inner)

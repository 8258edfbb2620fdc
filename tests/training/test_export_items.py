"""The item index of a retrieval checkpoint: every item once, with the vector that its tower gives it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from roo_ray.config import Config, Embeddings, Holdout, Ingest, Model, Training
from roo_ray.errors import ConfigError
from roo_ray.ingest.stream import RankStream, StreamSettings
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.item_index import ItemIndex
from roo_ray.models.ranking import RankingModel
from roo_ray.training import checkpoint
from roo_ray.training.checkpoint import RunState
from roo_ray.training.export_items import export_items
from roo_ray.training.sharding import shard
from tests.ingest.shard_maker import random_rows, schema, write_data_set
from tests.training.ranks import one_rank

SIZES = {"dim": 8, "layers": 1, "heads": 2, "user_dim": 8}
TRAINING = Training(seed=3, row_wise_from=20)


def save(folder: Path, model: Model) -> Path:
    """A checkpoint of a model with its initial weights, a function of the seed."""
    with one_rank():
        torch.manual_seed(3)
        made = RankingModel(schema(), model, torch.device("meta"))
        sharded = shard(made, TRAINING, torch.device("cpu"), batch_requests=8, ids_per_request={})
        state = RunState(
            epoch=1, step=1, schema_yaml=schema().to_yaml(), model=model, data_version=1, data_digest="d", plan={}
        )
        checkpoint.save(folder, sharded, state, 0)
    return folder


def test_every_item_has_its_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roo_ray.training.export_items.MERGE_AT", 30)  # several merges in a pass
    settings = Model(kind="retrieval", **SIZES)  # type: ignore[arg-type]
    rows = random_rows([3, 1, 7, 4] * 8, 1, days=2)
    write_data_set(tmp_path / "data", rows, schema())
    ingest = Ingest(batch_impressions=12)
    config = Config(name="x", schema=schema(), requests=str(tmp_path / "data"), ingest=ingest, training=TRAINING)
    path = tmp_path / "out" / "items.parquet"
    done = export_items(config, str(save(tmp_path / "c", settings)), str(path), lambda line: None)
    index = ItemIndex.load(path)
    assert (done.items, done.dim, done.requests, done.impressions) == (len(index.ids), 8, 32, 120)
    assert [file.name for file in path.parent.iterdir()] == ["items.parquet"]

    torch.manual_seed(3)
    plain = RankingModel(schema(), settings).eval()
    initialise_tables(plain, 3)
    one_each = Ingest(lanes=1, batch_impressions=1, reader="thread")
    how = StreamSettings(
        str(tmp_path / "data"), 1, schema(), one_each, Holdout(by="all"), "evaluation", 0, (0,), "sequential"
    )
    expected: dict[int, torch.Tensor] = {}
    stream = RankStream(how, 0, 1)
    for step in stream.epoch(0):
        if not step.lanes_alive:
            break
        with torch.no_grad():
            vectors = plain(step.batch).chunk(2, dim=1)[1]
        expected |= dict(zip(step.batch.impression_ids["item"].values.tolist(), vectors, strict=True))
    stream.close()
    assert index.ids.tolist() == sorted(expected)
    torch.testing.assert_close(index.vectors, torch.stack([expected[i] for i in sorted(expected)]))
    again = index.search(index.vectors, 1).squeeze(1)  # an item's own vector finds it
    torch.testing.assert_close(index.vectors[torch.searchsorted(index.ids, again)], index.vectors, rtol=1e-4, atol=1e-4)


def test_ranking_models_have_no_item_vectors(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", Model(kind="two_tower", **SIZES))  # type: ignore[arg-type]
    config = Config(name="x", schema=schema(), requests=str(tmp_path / "data"))
    with pytest.raises(ConfigError, match="is a model of kind 'two_tower'"):
        export_items(config, str(folder), str(tmp_path / "items.parquet"), lambda line: None)


GPU_OPTIONS = {"weights": "bf16", "optimizer": "adam", "uvm": ["item"], "index_dedup": True}


def test_a_model_trained_on_gpus_is_exported_on_cpu(tmp_path: Path) -> None:
    """Its tables are stored in bfloat16 and its options do not exist on CPU: what counts is the vectors."""
    rows = random_rows([3, 1, 7, 4], 1, days=1)
    write_data_set(tmp_path / "data", rows, schema())
    config = Config(name="x", schema=schema(), requests=str(tmp_path / "data"), training=TRAINING)
    plain, trained = tmp_path / "plain", tmp_path / "trained"
    settings = Model(kind="retrieval", **SIZES)  # type: ignore[arg-type]
    save(plain, settings)
    state = checkpoint.read_state(plain)
    model = RankingModel(schema(), settings)
    tensors = {"model": dict(model.state_dict())}
    checkpoint.read_tensors(tensors, checkpoint.SafeReader(plain), state, "misfit", alone=True)
    halves = {k: v.bfloat16() if k.startswith("sparse.") else v for k, v in tensors["model"].items()}
    dcp.save({"model": halves, "optimizer": {"of.adam": torch.zeros(3)}}, checkpoint_id=trained, no_dist=True)
    on_gpu = settings.model_copy(update={"embeddings": Embeddings.model_validate(GPU_OPTIONS)})
    sizes = {file.name: file.stat().st_size for file in trained.iterdir()}
    (trained / checkpoint.STATE_FILE).write_text(
        checkpoint.state_json(state.model_copy(update={"model": on_gpu, "packed": {}}), sizes)
    )
    found = []
    for folder in (plain, trained):
        export_items(config, str(folder), str(tmp_path / "items.parquet"), lambda line: None)
        found.append(ItemIndex.load(tmp_path / "items.parquet"))
    assert torch.equal(found[0].ids, found[1].ids)
    torch.testing.assert_close(found[1].vectors, found[0].vectors, rtol=0, atol=0.02)  # bfloat16's precision
    assert not torch.equal(found[1].vectors, found[0].vectors)

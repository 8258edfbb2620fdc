"""The item index of a retrieval checkpoint: every item once, with the vector that its tower gives it alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp

from roo_ray.config import Config, Embeddings, Evaluation, Holdout, Ingest, Model, Training
from roo_ray.errors import ConfigError, DataError
from roo_ray.ingest.columns import plain_values
from roo_ray.ingest.stream import RankStream, StreamSettings
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.item_index import ItemIndex
from roo_ray.models.ranking import RankingModel
from roo_ray.requests.manifest import load_manifest
from roo_ray.sources.hashing import hash_array
from roo_ray.training import checkpoint, launch
from roo_ray.training.checkpoint import RunState
from roo_ray.training.evaluation import evaluate
from roo_ray.training.export_items import _OwnIds, export_items
from roo_ray.training.sharding import ShardedModel, shard
from roo_ray.training.summary import quality_rows
from tests.ingest.shard_maker import random_rows, schema, write_data_set
from tests.training.ranks import one_rank

SIZES = {"dim": 8, "layers": 1, "heads": 2, "user_dim": 8}
TRAINING = Training(seed=3, row_wise_from=20)


def sharded_model(model: Model, seed: int = 3) -> ShardedModel:
    """A model with its initial weights, a function of the seed."""
    torch.manual_seed(seed)
    made = RankingModel(schema(), model, torch.device("meta"))
    return shard(made, TRAINING, torch.device("cpu"), batch_requests=8, ids_per_request={})


def save(folder: Path, model: Model) -> Path:
    """A checkpoint of ``sharded_model``."""
    with one_rank():
        sharded = sharded_model(model)
        state = RunState(
            epoch=1, step=1, schema_yaml=schema().to_yaml(), model=model, data_version=1, data_digest="d", plan={}
        )
        checkpoint.save(folder, sharded, state, 0)
    return folder


def test_every_item_has_its_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roo_ray.models.item_index.MERGE_AT", 30)  # several merges in a pass
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
    stored = {row["request_id"]: row["item_id"] for row in rows}
    files = [tmp_path / "data" / file.path for file in load_manifest(str(tmp_path / "data")).files]
    order = [request for file in files for request in pq.read_table(file).column("request_id").to_pylist()]
    raw = [item for request in order for item in stored[request]]
    expected: dict[str, tuple[int, torch.Tensor]] = {}
    stream, place = RankStream(how, 0, 1), 0
    for step in stream.epoch(0):
        if not step.lanes_alive:
            break
        with torch.no_grad():
            vectors = plain(step.batch).chunk(2, dim=1)[1]
        for row, vector in zip(step.batch.impression_ids["item"].values.tolist(), vectors, strict=True):
            expected[raw[place]] = (row, vector)
            place += 1
    stream.close()
    assert place == len(raw) == 120
    items = sorted(expected)
    assert index.items is not None
    assert index.items.to_pylist() == items
    assert index.ids.tolist() == [expected[item][0] for item in items]
    torch.testing.assert_close(index.vectors, torch.stack([expected[item][1] for item in items]))
    nearest = index.nearest(index.vectors, 3)
    torch.testing.assert_close(index.vectors[nearest[:, 0]], index.vectors, rtol=1e-4, atol=1e-4)  # its own finds it
    assert index.search_items(index.vectors, 3) == [[items[i] for i in of] for of in nearest.tolist()]

    # the table is hashed: ids that collide are apart in the file, each with what its own features give
    written = pq.read_table(path)
    assert written.column_names == ["item", "row", "vector"]
    assert written.column("item").to_pylist() == items
    assert written.column("row").to_pylist() == [int(hash_array(pa.array([item]))[0]) % 50 for item in items]
    assert done.sharing == sum(n for n in Counter(index.ids.tolist()).values() if n > 1) > 0


LARGE = [2**63 + 5, 3, 2**63 + 2**20, 7, 3]


@pytest.mark.parametrize(
    ("kind", "items"),
    [
        (pa.uint64(), LARGE),
        (pa.int32(), [3, None, 1, 2, None]),
        (pa.dictionary(pa.int8(), pa.string()), ["b", "a", None, "c", "a"]),
    ],
)
def test_ids_keep_their_type_over_windows(kind: pa.DataType, items: list[Any]) -> None:
    own, rows = _OwnIds(), np.array([11, 12, 13, 14, 12])
    parts = [slice(0, 2), slice(2, 5), slice(0, 2)]
    numbers = [own.numbers(plain_values(pa.array(items[part], kind)), rows[part]) for part in parts]
    found, of_found = own.all()
    assert found.to_pylist() == list(dict.fromkeys(items))
    assert found.type == (pa.string() if pa.types.is_dictionary(kind) else kind)
    every = torch.cat(numbers).numpy()
    assert found.take(pa.array(every)).to_pylist() == items + items[:2]
    assert of_found[every].tolist() == [*rows, *rows[:2]]


def quiet(line: str) -> None:
    """Progress goes nowhere."""


def test_recall_among_all_exported_items_is_that_of_a_brute_force_search(tmp_path: Path) -> None:
    settings = Model(kind="retrieval", **SIZES)  # type: ignore[arg-type]
    data, path = str(tmp_path / "data"), str(tmp_path / "items.parquet")
    write_data_set(tmp_path / "data", random_rows([3, 1, 7, 4] * 8, 1, days=2), schema())
    config = Config(name="x", schema=schema(), requests=data, training=TRAINING)
    done = export_items(config, str(save(tmp_path / "c", settings)), path, quiet)
    holdout, ingest = Holdout(by="request", fraction=0.25), Ingest(lanes=1, batch_impressions=12, reader="thread")
    how = StreamSettings(data, 1, schema(), ingest, holdout, "evaluation", 0, (0,), "sequential")

    def measured(model: ShardedModel, items: str | None) -> dict[str, float]:
        stream, cpu = RankStream(how, 0, 1), torch.device("cpu")
        try:
            return evaluate(model, schema(), stream, cpu, quiet, Evaluation(), 0, items=items)[0]
        finally:
            stream.close()

    with one_rank():
        model = sharded_model(settings)
        among_all, of_the_pass = measured(model, path), measured(model, None)
        with pytest.raises(DataError, match=r"items\.parquet are of another model"):
            measured(sharded_model(settings, seed=4), path)
        recalls, seen = [], set[int]()
        table = pq.read_table(path)
        rows, vectors = table.column("row").to_numpy(), np.stack(table.column("vector").to_numpy())
        stream = RankStream(how, 0, 1)
        for step in stream.epoch(0):
            if not step.lanes_alive:
                break
            batch = step.batch
            with torch.no_grad():
                users = model.module.eval()(batch).chunk(2, dim=1)[0].numpy()
            of, shown = batch.request_of_impression().numpy(), batch.impression_ids["item"].values.numpy()
            positive = ((batch.labels * batch.weights)[:, 0] > 0).numpy()
            seen |= set(shown.tolist())
            for request in np.unique(of[positive]):
                best = rows[np.argsort(-(vectors @ users[of == request][0]), kind="stable")[:10]]
                recalls.append(np.isin(shown[positive & (of == request)], best).mean())
        stream.close()
    assert among_all["eval/items"] == done.items > of_the_pass["eval/items"] > 10
    assert of_the_pass["eval/items"] <= len(seen)
    assert among_all["eval/requests_with_positive"] == of_the_pass["eval/requests_with_positive"] == len(recalls) > 3
    assert among_all["eval/recall_at_10"] == pytest.approx(np.mean(recalls), abs=1e-9)
    assert 0 < among_all["eval/recall_at_10"] < of_the_pass["eval/recall_at_10"] < 1
    assert ["items looked through", f"{done.items}"] in quality_rows(among_all)
    others = {name: value for name, value in among_all.items() if "/click/" in name}
    assert others == pytest.approx({name: of_the_pass[name] for name in others}, nan_ok=True)


def test_what_items_an_evaluation_takes(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data", random_rows([3, 1], 1), schema())
    config = Config(name="x", schema=schema(), requests=str(tmp_path / "data"))
    ranking = str(save(tmp_path / "ranking", Model(kind="two_tower", **SIZES)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kind 'two_tower': retrieval alone looks for items"):
        launch.evaluate(config, ranking, "x", quiet, items="items.parquet")
    retrieval = str(save(tmp_path / "retrieval", Model(kind="retrieval", **SIZES)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"item vectors .*missing\.parquet cannot be read"):
        launch.evaluate(config, retrieval, "x", quiet, items=str(tmp_path / "missing.parquet"))
    pq.write_table(pa.table({"item": [1], "vector": [[0.5]]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet has no item vectors"):
        launch.evaluate(config, retrieval, "x", quiet, items=str(tmp_path / "other.parquet"))


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

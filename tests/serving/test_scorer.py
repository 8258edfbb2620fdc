"""An exported model, without Ray: every kind of feature is scored as the training's own path scores it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from roo_ray.config import Holdout, Model
from roo_ray.errors import DataError
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import Window
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.ingest.units import UnitRef, units_of
from roo_ray.models.ranking import RankingModel
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.serving.export import export_model, input_types
from roo_ray.serving.predict import ScoreFiles, scored_table
from roo_ray.serving.publish import save_mlflow_model
from roo_ray.serving.scorer import Scorer, plain_columns
from roo_ray.training.checkpoint import STATE_FILE, RunState
from tests.ingest.shard_maker import random_rows, schema, write_data_set

MODEL = Model(dim=8, layers=1, heads=2, user_dim=8, cross_layers=1, cross_rank=4, tower=[8])
COUNTS = [1, 5, 3, 9, 2, 7, 4, 1, 6, 2]


class Trained:
    """A data set of ``folder``, a checkpoint of a model for it, and the model."""

    def __init__(self, folder: Path) -> None:
        self.data = str(folder / "data")
        write_data_set(folder / "data", random_rows(COUNTS, 3), schema())
        self.manifest: Manifest = load_manifest(self.data)
        torch.manual_seed(0)
        self.model = RankingModel(schema(), MODEL).eval()
        self.checkpoint = str(folder / "checkpoint")
        tensors = {"model": dict(self.model.state_dict())}
        dcp.save(tensors, storage_writer=FileSystemWriter(self.checkpoint), no_dist=True)
        state = RunState(
            epoch=1, step=7, schema_yaml=schema().to_yaml(), model=MODEL, data_version=1, data_digest="d", plan={}
        )
        Path(self.checkpoint, STATE_FILE).write_text(json.dumps(state.model_dump(mode="json")))
        self.inputs = input_types(self.data, self.manifest, schema())
        self.exported = export_model(self.checkpoint, self.inputs, folder / "model")
        paths = [file.path for file in self.manifest.files]
        self.table = pa.concat_tables([pq.ParquetFile(f"{self.data}/{path}").read() for path in paths])

    def expected(self) -> np.ndarray:
        """(N, K) logits of the stored requests by the way that training reads them."""
        units = units_of(self.manifest.files)
        refs: tuple[UnitRef, ...] = tuple(units.ref(unit) for unit in range(len(units)))
        settings = PackSettings(self.data, schema(), Holdout(by="all"), "evaluation", 10)
        packed = PackedBatches(pack_window(settings, Window(0, 0, 0, refs, None)), schema())
        with torch.no_grad():
            return torch.cat([self.model(packed.batch(row)) for row in range(packed.rows)]).numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("scorer"))


def test_stored_requests_score_as_in_training(trained: Trained) -> None:
    scorer = Scorer.load(trained.exported)
    scored = scorer.score(trained.table)
    assert scored.num_impressions.tolist() == trained.table.column("num_impressions").to_pylist()
    assert scored.logits == pytest.approx(trained.expected(), abs=1e-6)
    alone = [scorer.score(trained.table.slice(row, 1)).logits for row in range(trained.table.num_rows)]
    assert np.concatenate(alone) == pytest.approx(scored.logits, abs=1e-5)


def test_plain_values_without_keys_and_labels_score_the_same(trained: Trained) -> None:
    scorer = Scorer.load(trained.exported)
    columns = plain_columns(trained.table, schema())
    assert not {"clicked", "bought", "request_id", "user_id", "num_impressions"} & set(columns)
    scores = scorer.predict(json.loads(json.dumps(columns)))
    assert list(scores) == ["click", "buy"]
    chances = 1 / (1 + np.exp(-trained.expected().astype(np.float64)))
    for k, task in enumerate(scores):
        counts = trained.table.column("num_impressions").to_pylist()
        assert [len(row) for row in scores[task]] == counts
        assert np.concatenate(scores[task]) == pytest.approx(chances[:, k], abs=1e-6)


def test_wrong_inputs_are_named(trained: Trained) -> None:
    scorer = Scorer.load(trained.exported)
    columns = plain_columns(trained.table, schema())
    with pytest.raises(DataError, match="no column 'item_id'"):
        scorer.predict({name: values for name, values in columns.items() if name != "item_id"})
    with pytest.raises(DataError, match="column 'age' of the input is no int32"):
        scorer.predict(columns | {"age": ["old"] * len(columns["age"])})
    short = [values[:-1] if i == 1 else values for i, values in enumerate(columns["price"])]
    with pytest.raises(DataError, match="column 'price' has 4 values for 5 impressions in request"):
        scorer.predict(columns | {"price": short})
    with pytest.raises(DataError, match="no column history_time"):
        scorer.score(trained.table.drop_columns(["history_time"]))
    with pytest.raises(DataError, match=r"column 'country_id' of the input has 18014398509481984 as a float"):
        scorer.predict(columns | {"country_id": [2.0**54] + [None] * (len(COUNTS) - 1)})
    empty = scorer.predict({name: [] for name in columns})
    assert empty == {"click": [], "buy": []}


def test_a_row_per_impression(trained: Trained) -> None:
    table = scored_table(Scorer.load(trained.exported), trained.table, schema(), "here")
    assert table.column_names == ["request_id", "site", "item_id", "score_click", "score_buy"]
    assert table.column("item_id").to_pylist() == [i for row in trained.table["item_id"].to_pylist() for i in row]
    repeated = np.repeat(trained.table["request_id"].to_numpy(), trained.table["num_impressions"].to_numpy())
    assert table.column("request_id").to_pylist() == repeated.tolist()


def test_mlflow_model_with_a_signature(trained: Trained, tmp_path: Path) -> None:
    save_mlflow_model(trained.checkpoint, trained.inputs, schema(), tmp_path / "model")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    names = loaded.metadata.signature.inputs.input_names()
    assert names == trained.inputs.names
    assert loaded.metadata.signature.outputs.input_names() == ["click", "buy"]
    columns = plain_columns(trained.table, schema())
    nulls = {name for name, values in columns.items() if any(value is None for value in values)}
    assert {"age", "country_id", "interest_words", "device_id", "history_item"} <= nulls  # integers among them
    assert any(None in row for row in columns["topic_id"])
    rows = pd.DataFrame(columns)
    expected = Scorer.load(trained.exported).predict(columns)
    for task, scores in expected.items():
        found = loaded.predict(rows)[task].tolist()  # all at once: pandas makes floats of integers beside nulls
        assert np.concatenate(found) == pytest.approx(np.concatenate(scores), abs=1e-6)
    for row in range(len(COUNTS)):  # one request, as a service sends it
        one = pd.DataFrame([{name: values[row] for name, values in columns.items()}])
        assert loaded.predict(one)["click"][0] == pytest.approx(expected["click"][row], abs=1e-6)
    assert not list((tmp_path / "model").rglob("*.pkl"))
    with pytest.raises(mlflow.exceptions.MlflowException, match="item_id"):
        loaded.predict(rows.drop(columns="item_id"))

    # what may be null may be left out, and is null then
    optional = [name for name in names if not loaded.metadata.signature.inputs.input_dict()[name].required]
    assert {"age", "topic_id", "price", "history_time", "tag_ids", "device_id"} <= set(optional)
    assert not {"is_subscriber", "item_id"} & set(optional)
    candidates = ("topic_id", "price", "rank", "tag_ids")
    null = {
        name: [[None] * count for count in COUNTS] if name in candidates else [None] * len(COUNTS) for name in optional
    }
    without = loaded.predict(rows.drop(columns=optional))["click"].tolist()
    with_nulls = Scorer.load(trained.exported).predict(columns | null)["click"]
    assert np.concatenate(without) == pytest.approx(np.concatenate(with_nulls), abs=1e-6)
    assert np.concatenate(without) != pytest.approx(np.concatenate(expected["click"]), abs=1e-6)


def test_a_scoring_process_writes_its_files(trained: Trained, tmp_path: Path) -> None:
    """What predict's Ray Data actors do, without Ray: files of several units, and a damaged one named."""
    model = {path.name: path.read_bytes() for path in trained.exported.iterdir()}
    score = ScoreFiles(model, trained.data, schema(), str(tmp_path))
    units = units_of(trained.manifest.files)
    every = [units.ref(unit) for unit in range(len(units))]
    missing = UnitRef("data/none.parquet", 0, 1)
    batch = {"file": [0, 1], "units": [json.dumps([asdict(u) for u in some]) for some in (every, [missing])]}
    done = score(batch)
    assert done["requests"] == [len(COUNTS), 0]
    assert done["impressions"] == [sum(COUNTS), 0]
    assert done["error"][0] == ""
    assert "none.parquet is missing" in done["error"][1]
    table = pq.read_table(tmp_path / "part-00000.parquet")
    assert table.equals(scored_table(score.scorer, trained.table, schema(), "here"))

"""An exported model, without Ray: every kind of feature is scored as the training's own path scores it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from roo_ray.config import Embeddings, Holdout, Model
from roo_ray.errors import DataError
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import Window
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.ingest.units import UnitRef, units_of
from roo_ray.models.pooled import unpooled_name
from roo_ray.models.ranking import RankingModel
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.schema import Schema, parse_schema
from roo_ray.serving.export import export_model, input_types
from roo_ray.serving.predict import ScoreFiles, scored_table
from roo_ray.serving.publish import own_code, save_mlflow_model
from roo_ray.serving.scorer import Scorer, plain_columns
from roo_ray.training.checkpoint import STATE_FILE, RunState, as_stored
from tests.ingest.shard_maker import SCHEMA, random_rows, schema, write_data_set
from tests.models import own_towers

MODEL = Model(dim=8, layers=1, heads=2, user_dim=8, cross_layers=1, cross_rank=4, tower=[8])
COUNTS = [1, 5, 3, 9, 2, 7, 4, 1, 6, 2]


class Trained:
    """A data set of ``folder``, a checkpoint of a model for it, and the model."""

    def __init__(self, folder: Path, settings: Model = MODEL, of: Schema | None = None) -> None:
        self.schema = of or schema()
        self.data = str(folder / "data")
        rows = random_rows(COUNTS, 3)
        if of is not None:  # its ranks must be known
            rows = [row | {"rank": [rank or 0 for rank in row["rank"]]} for row in rows]
        write_data_set(folder / "data", rows, self.schema)
        self.manifest: Manifest = load_manifest(self.data)
        torch.manual_seed(0)
        self.model = RankingModel(self.schema, settings).eval()
        self.checkpoint = str(folder / "checkpoint")
        tensors = as_stored({"model": dict(self.model.state_dict())})
        dcp.save(tensors, storage_writer=FileSystemWriter(self.checkpoint), no_dist=True)
        state = RunState(
            epoch=1, step=7, schema_yaml=self.schema.to_yaml(), model=settings, data_version=1, data_digest="d", plan={}
        )
        Path(self.checkpoint, STATE_FILE).write_text(json.dumps(state.model_dump(mode="json")))
        self.inputs = input_types(self.data, self.manifest, self.schema)
        self.exported = export_model(self.checkpoint, self.inputs, folder / "model")
        paths = [file.path for file in self.manifest.files]
        self.table = pa.concat_tables([pq.ParquetFile(f"{self.data}/{path}").read() for path in paths])

    def expected(self) -> np.ndarray:
        """(N, K) logits of the stored requests by the way that training reads them."""
        units = units_of(self.manifest.files)
        refs: tuple[UnitRef, ...] = tuple(units.ref(unit) for unit in range(len(units)))
        settings = PackSettings(self.data, self.schema, Holdout(by="all"), "evaluation", 10)
        packed = PackedBatches(pack_window(settings, Window(0, 0, 0, refs, None)), self.schema)
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


def test_pooled_tables_score_as_in_training_and_as_pooled_after_the_lookup(tmp_path: Path) -> None:
    trained = Trained(tmp_path, MODEL.model_copy(update={"embeddings": Embeddings(pooled=["word"])}))
    scored = Scorer.load(trained.exported).score(trained.table).logits
    assert scored == pytest.approx(trained.expected(), abs=1e-6)
    assert any("embedding_bags.word" in name for name in trained.model.state_dict())
    after = RankingModel(schema(), MODEL).eval()
    after.load_state_dict({unpooled_name(name): value for name, value in trained.model.state_dict().items()})
    trained.model = after
    assert scored == pytest.approx(trained.expected(), abs=1e-5)


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


def test_an_event_after_the_request_changes_no_score(trained: Trained) -> None:
    """Nor does one for which ``max_length`` would cut an earlier one."""
    scorer = Scorer.load(trained.exported)
    rows = trained.table.to_pylist()
    assert any(len(row["history_time"] or []) >= 4 for row in rows)  # max_length, or cut to it
    for n, row in enumerate(rows):
        late = row["request_time"].replace(tzinfo=None, microsecond=0) + timedelta(seconds=n % 3 + 1)
        event = {"history_time": late, "history_item": "i7", "history_topic": 3}
        event |= {"history_dwell": 9.0, "history_score": 0.5}
        for name, value in event.items():
            row[name] = list(row[name] or [])
            row[name].insert(min(n % 7, len(row[name])), value)
    injected = pa.Table.from_pylist(rows, trained.table.schema)
    assert scorer.score(injected).logits == pytest.approx(scorer.score(trained.table).logits, abs=1e-6)


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
    with pytest.raises(DataError, match=r"unequal length: 'age' has 9 values and '\w+' 10; give one for each request"):
        scorer.predict(columns | {"age": columns["age"][:-1]})
    empty = scorer.predict({name: [] for name in columns})
    assert empty == {"click": [], "buy": []}


def without_candidates(columns: dict[str, Any], rows: set[int]) -> dict[str, Any]:
    """The columns, with no candidate in these requests."""
    names = {c for f in schema().features if f.level == "impression" for c in f.source_columns}
    return columns | {name: [[] if i in rows else v for i, v in enumerate(columns[name])] for name in names}


def test_a_request_without_candidates_has_no_scores_and_costs_no_other_its_own(trained: Trained) -> None:
    scorer = Scorer.load(trained.exported)
    columns = plain_columns(trained.table, schema())
    expected, found = scorer.predict(columns), scorer.predict(without_candidates(columns, {0, 3, len(COUNTS) - 1}))
    for task, scores in expected.items():
        kept = [[] if row in {0, 3, len(COUNTS) - 1} else of for row, of in enumerate(scores)]
        assert [len(of) for of in found[task]] == [len(of) for of in kept]
        assert np.concatenate(found[task]) == pytest.approx(np.concatenate(kept), abs=1e-6)
    none = scorer.predict(without_candidates(columns, set(range(len(COUNTS)))))
    assert none == {task: [[]] * len(COUNTS) for task in ("click", "buy")}
    one = without_candidates(columns, {2})
    with pytest.raises(DataError, match="column 'price' has values for candidates in row 2"):
        scorer.predict(one | {"price": columns["price"]})


def with_position(also_read: bool = False) -> Schema:
    """The rank is a feature that needs a value, on a scale, and maybe another feature's too."""
    text = SCHEMA.replace("columns: [price, rank], fill: -1}", "columns: price, fill: -1}")
    features = ["{name: place, level: impression, kind: dense, columns: rank, scale: log1p}"]
    features += ["{name: again, level: impression, kind: dense, columns: rank}"] * also_read
    return parse_schema(text.replace("labels:", "".join(f"  - {line}\n" for line in features) + "labels:"))


POSITION = MODEL.model_copy(update={"position_feature": "rank", "position_value": 3.0})


def test_a_fixed_position_need_not_be_sent(tmp_path: Path) -> None:
    trained = Trained(tmp_path, POSITION, with_position())
    scorer = Scorer.load(trained.exported)
    columns = plain_columns(trained.table, trained.schema)
    expected = scorer.predict(columns)
    chances = 1 / (1 + np.exp(-trained.expected().astype(np.float64)))
    assert np.concatenate(expected["click"]) == pytest.approx(chances[:, 0], abs=1e-6)
    without = {name: values for name, values in columns.items() if name != "rank"}
    assert len(without) == len(columns) - 1
    assert scorer.predict(without) == expected
    nulls: list[Any] = [[None] * count for count in COUNTS]
    other: list[Any] = [[7 * rank + 1 for rank in ranks] for ranks in columns["rank"]]
    for ranks in (nulls, other, [None] * len(COUNTS)):
        assert scorer.predict(columns | {"rank": ranks}) == expected
    less = trained.table.drop_columns(["rank"])
    assert np.array_equal(scorer.score(less).logits, scorer.score(trained.table).logits)
    none = scorer.predict({name: v for name, v in without_candidates(columns, {1}).items() if name != "rank"})
    assert [len(of) for of in none["click"]] == [0 if row == 1 else count for row, count in enumerate(COUNTS)]

    save_mlflow_model(trained.checkpoint, trained.inputs, trained.schema, tmp_path / "mlflow")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "mlflow"))
    for sent in (columns, without, columns | {"rank": nulls}):
        found = loaded.predict(pd.DataFrame(sent))["click"].tolist()
        assert np.concatenate(found) == pytest.approx(np.concatenate(expected["click"]), abs=1e-6)
    without.pop("is_subscriber")  # another one that needs a value
    with pytest.raises(mlflow.exceptions.MlflowException, match="is_subscriber"):
        loaded.predict(pd.DataFrame(without))


@pytest.mark.parametrize(("settings", "also_read"), [(MODEL, False), (POSITION, True)])
def test_a_position_that_something_reads_must_be_sent(tmp_path: Path, settings: Model, also_read: bool) -> None:
    trained = Trained(tmp_path, settings, with_position(also_read))
    scorer = Scorer.load(trained.exported)
    columns = plain_columns(trained.table, trained.schema)
    with pytest.raises(DataError, match="no column 'rank'"):
        scorer.predict({name: values for name, values in columns.items() if name != "rank"})
    with pytest.raises(DataError, match="no column rank"):
        scorer.score(trained.table.drop_columns(["rank"]))


def test_shards_without_a_fixed_position_are_scored(tmp_path: Path) -> None:
    trained = Trained(tmp_path, POSITION, with_position())
    expected = scored_table(Scorer.load(trained.exported), trained.table, trained.schema, "here")
    units = units_of(trained.manifest.files)
    refs = [units.ref(unit) for unit in range(len(units))]
    for path in {ref.path for ref in refs}:
        stored = pq.ParquetFile(f"{trained.data}/{path}").read()
        pq.write_table(stored.drop_columns(["rank"]), f"{trained.data}/{path}", row_group_size=5)
    inputs = input_types(trained.data, trained.manifest, trained.schema)
    assert [name for name in trained.inputs.names if name not in inputs.names] == ["rank"]
    exported = export_model(trained.checkpoint, inputs, tmp_path / "again")
    model = {path.name: path.read_bytes() for path in exported.iterdir()}
    score = ScoreFiles(model, trained.data, trained.schema, str(tmp_path))
    done = score({"file": [0], "units": [json.dumps([asdict(ref) | {"file_bytes": 0} for ref in refs])]})
    assert (done["error"], done["impressions"]) == ([""], [sum(COUNTS)])
    assert pq.read_table(tmp_path / "part-00000.parquet").equals(expected)


def test_own_towers_go_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team's package, which the process that serves does not have."""
    package = tmp_path / "code" / "team_of_this_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "towers.py").write_text(Path(own_towers.__file__).read_text())
    with monkeypatch.context() as with_it:
        with_it.syspath_prepend(str(tmp_path / "code"))
        settings = MODEL.model_copy(update={"towers": "team_of_this_test.towers:OwnTowers"})
        trained = Trained(tmp_path, settings)
        expected = Scorer.load(trained.exported).predict(plain_columns(trained.table, schema()))
        save_mlflow_model(trained.checkpoint, trained.inputs, schema(), tmp_path / "mlflow")
        for name in [name for name in sys.modules if name.startswith("team_of_this_test")]:
            with_it.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("team_of_this_test")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "code").rename(tmp_path / "elsewhere")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "mlflow"))
    found = loaded.predict(pd.DataFrame(plain_columns(trained.table, schema())))["click"].tolist()
    assert np.concatenate(found) == pytest.approx(np.concatenate(expected["click"]), abs=1e-6)
    assert str(tmp_path / "mlflow") in str(sys.modules["team_of_this_test"].__file__)
    assert own_code(MODEL) == []


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
    none = loaded.predict(pd.DataFrame(without_candidates(columns, {1})))
    assert [len(of) for of in none["click"]] == [0 if row == 1 else count for row, count in enumerate(COUNTS)]
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

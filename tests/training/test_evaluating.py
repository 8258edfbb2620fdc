"""A checkpoint of a GPU run, whose options of ``model.embeddings`` a CPU does not have, is evaluated on CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from roo_ray.config import Embeddings
from roo_ray.errors import ConfigError, DataError
from roo_ray.models.check import check_model, evaluated_as
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.ranking import RankingModel
from roo_ray.training import checkpoint
from roo_ray.training.checkpoint import RunState
from roo_ray.training.packing import PACKED, pack
from roo_ray.training.sharding import shard
from tests.models.batches import random_batch, schema
from tests.training.ranks import MODEL, TRAINING, full_weights, one_rank, sharded_model

ON_GPU = Embeddings(
    weights="bf16", optimizer="adam", uvm=["item"], index_dedup=True, sharding={"topic": "data_parallel"}
)


def gpu_checkpoint(folder: Path) -> RankingModel:
    """Writes what a GPU run leaves: tables in bfloat16, one that is replicated and so among the packed tensors, state
    of another optimizer. Returns the model with these weights."""
    torch.manual_seed(3)
    trained = RankingModel(schema(), MODEL)
    initialise_tables(trained, 3)
    tables = {n: v.bfloat16() for n, v in trained.state_dict().items() if n.startswith("sparse.")}
    apart = {n: v for n, v in tables.items() if not n.endswith("topic.weight")}
    rest = {n: tables.get(n, v) for n, v in trained.state_dict().items() if n not in apart}
    _, large, index = pack({"model": rest, "optimizer": {"item.adam": torch.zeros(3)}})
    dcp.save({"model": apart, PACKED: large}, checkpoint_id=folder, no_dist=True)
    settings = MODEL.model_copy(update={"embeddings": ON_GPU})
    about = {"epoch": 1, "step": 3, "schema_yaml": schema().to_yaml(), "model": settings, "data_version": 1}
    state = RunState(**about, data_digest="d", plan={}, packed=index)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / checkpoint.STATE_FILE).write_text(checkpoint.state_json(state, sizes))
    trained.load_state_dict({n: v.float() for n, v in tables.items()}, strict=False)
    return trained.eval()


def test_a_gpu_run_is_evaluated_on_cpu(tmp_path: Path) -> None:
    trained = gpu_checkpoint(tmp_path)
    state = checkpoint.read_state(tmp_path)
    with pytest.raises(ConfigError, match="do not exist on CPU"):
        check_model(schema(), state.model, "cpu")
    settings = evaluated_as(state.model, "cpu")
    check_model(schema(), settings, "cpu")
    batch = random_batch(schema(), [3, 1, 4], 2)
    with one_rank():
        with pytest.raises(DataError, match="does not fit this model"):
            checkpoint.load(tmp_path, sharded_model())  # to go on with, its optimizer is another
        model = RankingModel(schema(), settings, torch.device("meta"))
        sharded = shard(
            model,
            TRAINING,
            torch.device("cpu"),
            batch_requests=4,
            ids_per_request={},
            embeddings=settings.embeddings,
        )
        assert checkpoint.load_weights(tmp_path, sharded).step == 3
        weights = full_weights(sharded)
        with torch.no_grad():
            logits = sharded.module.eval()(batch)
    assert weights.keys() == trained.state_dict().keys()
    for name, value in trained.state_dict().items():
        assert torch.equal(weights[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(logits, trained(batch))


def test_what_does_not_matter_in_evaluation_is_left_out() -> None:
    settings = MODEL.model_copy(update={"embeddings": ON_GPU})
    assert evaluated_as(settings, "cpu") == MODEL
    assert evaluated_as(settings, "cuda").embeddings == Embeddings(weights="bf16")
    halves = MODEL.model_copy(update={"embeddings": Embeddings(weights="fp16", sharding={"item": "column_wise"})})
    assert evaluated_as(halves, "cpu").embeddings == Embeddings(weights="fp16")

"""A run that is evicted, at a batch that is left out or after it, ends as one that nothing happened to (gloo, no Ray);
and the window of its metrics goes on over epochs, checkpoints and restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml

from roo_ray.config import load_config
from roo_ray.errors import Evicted
from roo_ray.ingest.plan import plan_inputs
from roo_ray.ingest.stream import RankStream, Step
from roo_ray.requests.manifest import load_manifest
from roo_ray.sources.hashing import hash_rows
from roo_ray.training import checkpoint, entry, worker
from roo_ray.training.tracking import RunHandle
from tests.jobs.faults import tensors
from tests.training.ranks import run_ranks
from tests.training.test_going_on import WORLD, EvictedAfter, a_worker, write_small_run

EPOCHS, EVERY = 3, 4
SPOILT = 40  # the batch of this request is left out in every epoch
LEFT_OUT = "train/not_finite_batches"

Logged = dict[str, dict[int, float]]


def _with_nan(epoch: Callable[[int], Iterator[Step]], key: int, number: int) -> Iterator[Step]:
    """The steps of an epoch, a request's features not finite: no reader lets such values in, models make them."""
    for step in epoch(number):
        spoilt = step.batch.request_key == key
        dense = torch.where(spoilt[:, None], torch.nan, step.batch.request_dense)
        yield replace(step, batch=replace(step.batch, request_dense=dense)) if spoilt.any() else step


def _train(rank: int, path: str, folder: str, evict_at: int | None = None) -> dict[str, Any]:
    """A whole run, evicted once at a step or never: what it has logged, and its checkpoints."""
    config = load_config(path)
    schema, ingest, holdout = config.request_schema, config.ingest, config.holdout
    plan = plan_inputs(load_manifest(config.requests), schema, ingest, holdout, "train", 0, "shuffled", (1.0,) * 5)
    rows = pq.read_table(config.requests, columns=["request_id", "site"])
    row = rows.filter(pc.equal(rows.column("request_id"), SPOILT))
    key = int(hash_rows(row, ["request_id", "site"]).view(np.int64)[0])
    logged: Logged = {}
    streams: list[RankStream] = []
    reported: list[str] = []
    ray.train.report = lambda metrics, checkpoint, **how: reported.append(checkpoint.path)  # type: ignore[assignment]

    def log(values: Mapping[str, float], step: int = 0) -> None:
        for name, value in values.items():
            points = logged.setdefault(name, {})
            assert step not in points or name.startswith("checkpoint/"), f"{name} was logged twice at step {step}"
            points[step] = value

    def begin() -> worker.Worker:
        one = a_worker(rank, config, RunHandle(None), folder, plan)
        one.logger.metrics = log  # type: ignore[method-assign,assignment]
        stream = one.stream

        def opened(*of: Any) -> RankStream:
            streams.append(stream(*of))
            if of[0] == "train":
                streams[-1].epoch = partial(_with_nan, streams[-1].epoch, key)  # type: ignore[method-assign]
            return streams[-1]

        one.stream = opened  # type: ignore[method-assign,assignment]
        return one

    one = begin()
    if evict_at is not None:
        one.evicted = EvictedAfter(one, evict_at if rank else 10**9)
        with pytest.raises(Evicted, match=f"at step {evict_at};"):
            entry.train(one, None)
        one = begin()
        entry.train(one, ray.train.Checkpoint(reported[-1], filesystem=pafs.LocalFileSystem()))
    else:
        entry.train(one, None)
    for stream in streams:
        stream.close()
    states = {path: checkpoint.read_state(path) for path in reported if Path(path).is_dir()}
    return {"logged": logged, "last": reported[-1], "trained": {s.step: s.trained for s in states.values()}}


def _all(rank: int, world: int, folder: str) -> dict[str, dict[str, Any]]:
    found = {"each": _train(rank, f"{folder}/config.yaml", f"{folder}/each")}
    found["plain"] = _train(rank, f"{folder}/every.yaml", f"{folder}/plain")
    first = min(found["plain"]["logged"][LEFT_OUT])
    for late in (0, 1):
        found[f"evicted {late}"] = _train(rank, f"{folder}/every.yaml", f"{folder}/evicted-{late}", first + late)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What rank 0 found of a run with a line for each step, of one with a line for every four, and of such ones that
    were evicted: at the first batch that was left out, and at the step after it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = {"on_nan": "skip", "max_nan_batches": 9, "epochs": EPOCHS, "deterministic": True}
    write_small_run(folder, **settings)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["training"]["log_every"] = EVERY
    (folder / "every.yaml").write_text(yaml.safe_dump(content))
    found = run_ranks(WORLD, _all, str(folder))[0]
    return {name: run | {"tensors": tensors(run["last"], folder)} for name, run in found.items()}


@pytest.mark.parametrize("late", [0, 1])
def test_a_run_evicted_amid_batches_that_are_left_out_ends_as_an_undisturbed_one(
    runs: dict[str, dict[str, Any]], late: int
) -> None:
    """The same losses, counts and batches that are left out, and the same model, to the bit."""
    plain, evicted = runs["plain"], runs[f"evicted {late}"]
    assert list(plain["logged"][LEFT_OUT].values()) == list(range(1, EPOCHS + 1))  # once an epoch
    for name in ("train/loss", LEFT_OUT, "epoch/requests", "epoch/not_finite_requests", "eval/click/log_loss"):
        assert plain["logged"][name] == evicted["logged"][name], name
    assert not plain["logged"]["train/loss"].keys() & plain["logged"][LEFT_OUT].keys()
    at = min(plain["logged"][LEFT_OUT]) + late
    assert evicted["trained"][at]["skipped_requests"] > 0
    for step, trained in plain["trained"].items():
        assert trained == evicted["trained"][step]
    assert plain["tensors"].keys() == evicted["tensors"].keys()
    for name, value in plain["tensors"].items():
        if name in ("/run/lifetime", "/run/window"):  # sums in another order
            assert torch.allclose(value, evicted["tensors"][name], rtol=1e-12, atol=0), name
        else:
            assert torch.equal(value, evicted["tensors"][name]), name


@pytest.mark.parametrize("name", ["plain", "evicted 0", "evicted 1"])
def test_the_window_goes_on_over_epochs_and_restarts(runs: dict[str, dict[str, Any]], name: str) -> None:
    """At a step that ``log_every`` divides it is of the last so many steps; at an epoch's end, and where the run was
    evicted, of those since then and as many before."""
    each, logged = runs["each"]["logged"], runs[name]["logged"]
    counts, losses = each["train/click/impressions"], each["train/click/log_loss"]
    steps = sorted(logged["train/click/log_loss"])
    last = max(counts)
    assert last in steps
    assert any(step % EVERY for step in steps)
    for step in steps:
        begin = step - EVERY if step % EVERY == 0 else max(step - step % EVERY - EVERY, 0)
        window = [s for s in range(begin + 1, step + 1) if s in counts]
        assert logged["train/click/impressions"][step] == sum(counts[s] for s in window)
        expected = sum(counts[s] * losses[s] for s in window) / sum(counts[s] for s in window)
        assert logged["train/click/log_loss"][step] == pytest.approx(expected, rel=1e-12)
    assert logged["train_lifetime/click/impressions"][last] == sum(counts.values())

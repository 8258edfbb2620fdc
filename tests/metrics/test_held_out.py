"""Exact AUC and GAUC by user over ranks, against scikit-learn and pair counting; the scores written and read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score

from roo_ray.errors import DataError
from roo_ray.metrics.held_out import HeldOutScores, exact_auc_over_ranks, read_scores
from tests.metrics.reference import pair_gauc
from tests.models.batches import random_batch, schema
from tests.processes import start_ranks

TASKS = ["click", "buy"]
RANKS = 3


def scored(seed: int, requests: int, levels: int = 7) -> tuple:
    """A batch with logits of few levels (ties everywhere) and users that lie on all ranks."""
    rng = np.random.default_rng(seed)
    batch = random_batch(schema(), rng.integers(1, 9, requests).tolist(), seed, known=0.8)
    batch.user_key.copy_(torch.tensor(rng.integers(-9, 9, requests)))
    batch.request_key.copy_(torch.arange(requests) + 1000 * seed)
    logits = torch.tensor(rng.integers(-levels, levels, (batch.total_impressions, 2)) / 3, dtype=torch.float32)
    return batch, logits


def parts() -> list[tuple]:
    """What each rank scores: the second rank nothing."""
    return [scored(1, 60), (None, None), scored(3, 35)]


def everything(parts: list[tuple]) -> tuple[np.ndarray, ...]:
    """users, logits, labels, known of all parts."""
    rows = [
        (b.user_key[b.request_of_impression()], x, b.labels, (b.weights > 0).float()) for b, x in parts if b is not None
    ]
    return tuple(torch.cat([row[i] for row in rows]).numpy() for i in range(4))


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    collected = HeldOutScores(TASKS, limit=10_000)
    batch, logits = parts()[rank]
    if batch is not None:
        collected.add(batch, logits)
    values = collected.result()
    collected.write(f"{folder}/scores", rank)
    one_sided = torch.full((4,), float(rank)), torch.tensor([rank % 2] * 4)
    values["separated"] = exact_auc_over_ranks(*one_sided)
    Path(folder, f"{rank}.json").write_text(json.dumps(values))
    few = HeldOutScores(TASKS, limit=200 if rank else 5)
    if batch is not None:
        few.add(batch, logits)
    assert few.result() == {"eval/exact": 0.0}
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    start_ranks(_rank, (str(folder),), RANKS)
    return folder


def test_three_ranks_give_the_exact_figures(folder: Path) -> None:
    users, logits, labels, known = everything(parts())
    order = np.argsort(users, kind="stable")
    _, counts = np.unique(users, return_counts=True)
    alone = HeldOutScores(TASKS, limit=10_000)
    for batch, x in parts():
        if batch is not None:
            alone.add(batch, x)
    expected = alone.result()
    for k, task in enumerate(TASKS):
        seen = known[:, k] > 0
        assert expected[f"eval/{task}/auc"] == pytest.approx(roc_auc_score(labels[seen, k], logits[seen, k]), rel=1e-12)
        value, used, skipped = pair_gauc(logits[order, k], labels[order, k], known[order, k], counts.tolist())
        assert expected[f"eval/{task}/gauc_user"] == pytest.approx(value, rel=1e-12)
        assert expected[f"eval/{task}/gauc_users"] == used
        assert expected[f"eval/{task}/gauc_users_skipped"] == skipped
    for rank in range(RANKS):
        measured = json.loads((folder / f"{rank}.json").read_text())
        # ranks 0 and 2 hold negatives below and above rank 1's positives: half of the pairs are won
        assert measured.pop("separated") == 0.5
        assert measured == pytest.approx(expected, rel=1e-12)


def test_scores_come_back_whole_and_in_order(folder: Path) -> None:
    table, tasks = read_scores(f"{folder}/scores")
    users, logits, labels, known = everything(parts())
    real = known.any(1)
    assert tasks == TASKS
    assert table.num_rows == real.sum()
    keys = table.column("request_key").to_numpy()
    assert (np.diff(keys) >= 0).all()
    for k, task in enumerate(TASKS):
        assert np.array_equal(table.column(f"logit_{task}").to_numpy(), logits[real, k])
        label = table.column(f"label_{task}").to_pandas()
        assert label.isna().sum() == (known[real, k] == 0).sum()
        assert label.sum() == (labels[real, k] * known[real, k]).sum()
    assert np.array_equal(table.column("user_key").to_numpy(), users[real])


def test_incomplete_scores_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no complete scores"):
        read_scores(str(tmp_path))
    for path in (folder / "scores").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    part = pq.read_table(tmp_path / "part-00000.parquet")
    pq.write_table(part.slice(1), tmp_path / "part-00000.parquet")
    with pytest.raises(DataError, match="scored impressions"):
        read_scores(str(tmp_path))


def test_scores_over_older_ones_are_complete_only_when_they_are_written(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "scores").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    read_scores(str(tmp_path))
    (tmp_path / "part-00000.parquet").unlink()
    (tmp_path / "part-00000.parquet").mkdir()  # cannot be written
    with pytest.raises(OSError, match="part-00000"):
        HeldOutScores(TASKS, 100).write(str(tmp_path), 0)
    with pytest.raises(DataError, match="no complete scores"):
        read_scores(str(tmp_path))


def test_one_class_has_no_auc() -> None:
    assert math.isnan(exact_auc_over_ranks(torch.randn(5), torch.ones(5)))
    assert math.isnan(exact_auc_over_ranks(torch.zeros(0), torch.zeros(0)))

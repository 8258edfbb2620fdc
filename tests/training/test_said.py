"""What a model is warned of reaches the job's terminal: from the driver's check, and from workers, whose own warnings
stay on their nodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from roo_ray.config import load_config
from roo_ray.errors import BadInput
from roo_ray.models import attention, attention_layout
from roo_ray.requests.lengths import MeanIds
from roo_ray.training import worker
from roo_ray.training.job import WorkerJob
from roo_ray.training.launch import train
from roo_ray.training.tracking import RunHandle
from tests.jobs.small import ROOT, small_config
from tests.models.test_attention import asked_anew, on_meta


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (
            "model.towers=tests.models.own_towers:WithBatchNorm",
            "warning: the towers' module norm is BatchNorm1d: its statistics are skewed by request-sorted batches",
        ),
        ("model={kind: two_tower, task_heads: mmoe}", "warning: model.kind two_tower does not use task_heads=mmoe"),
    ],
)
def test_the_driver_says_what_its_check_warns_of(key: str, line: str, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(BadInput, match="requests"):  # no data set: it comes no further than its checks
        train(small_config(tmp_path, key), "run", lines.append)
    assert [said for said in lines if said.startswith(line)]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker here, without what it does to its process; what was warned of before is warned of again."""
    for name in ("choose_algorithms", "guard_process", "keep_freed_memory"):
        monkeypatch.setattr(worker, name, lambda *of: None)
    monkeypatch.setattr(worker.session, "place_data", lambda of: None)
    monkeypatch.setattr(worker.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(worker, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(worker, "build_model", lambda *of: torch.nn.Identity())
    yield from asked_anew()
    attention.say_fallbacks(None)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_says_once_that_attention_is_the_reference(
    rank: int, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = SimpleNamespace(storage_filesystem=None, experiment_fs_path="")
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: 2, get_storage=lambda: storage)
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: context)
    monkeypatch.setenv("CC", "no-such-compiler")
    config = load_config(ROOT / "configs/demo.yaml", ["tracking.enabled=false"])
    lines: list[str] = []
    board = SimpleNamespace(post=SimpleNamespace(remote=lines.append))
    job = WorkerJob("evaluate", config, 1, "digest", MeanIds({}, ""), 8.0, 24.0, RunHandle(None), board, {})
    worker.Worker(job, threading.Event()).logger.close()
    layout = on_meta(attention_layout.layout(torch.tensor([2, 3]), None, 1))
    for _ in range(2):
        attention.attention(torch.zeros(5, 12, device="meta"), layout, 2, 3, torch.zeros(3, device="meta"), None)
    said = [line.partition(",")[0] for line in lines]
    assert said == (["warning: attention is the padded reference"] if rank == 0 else [])

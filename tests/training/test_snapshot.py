"""A snapshot of Ray Train that was cut short is made again from the checkpoints, as Ray Train would have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from roo_ray.config import Config
from roo_ray.errors import DataError
from roo_ray.training.checkpoint import STATE_FILE, RunState, read_state, state_json
from roo_ray.training.launch import checkpoints_to_keep, train
from roo_ray.training.prepare import prepare
from roo_ray.training.saver import UNSCORED, name_of, step_of
from roo_ray.training.snapshot import DAMAGED, SNAPSHOT_FILE, mend_snapshot
from tests.jobs.small import small_config
from tests.jobs.test_main_path import quiet

NE = "eval/click/ne"


def add_checkpoint(config: Config, epoch: int, step: int, metrics: dict[str, float | None]) -> Path:
    folder = Path(config.storage) / "run" / name_of(epoch, step)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"shard")
    state = RunState(
        epoch=epoch, step=step, schema_yaml=config.request_schema.to_yaml(), model=config.model, data_version=1,
        data_digest="d", plan={}, metrics=metrics,
    )  # fmt: skip
    (folder / STATE_FILE).write_text(state_json(state, {"__0_0.distcp": 5}))
    return folder


def as_ray_reads_it(config: Config) -> CheckpointManager:
    return CheckpointManager(checkpoints_to_keep(config), StorageContext(config.storage, "run"))


@pytest.mark.parametrize(("keep_by", "order"), [("last", [5, 9, 14, 18]), ("best", [14, 18, 5, 9])])
@pytest.mark.parametrize(
    "damage",
    [b"", b'{"ray_version": "2.60.0", "checkpoint_re', b"\0" * 64, b"null"],
    ids=["empty", "cut", "zeros", "null"],
)
def test_made_again_from_the_whole_checkpoints(tmp_path: Path, keep_by: str, order: list[int], damage: bytes) -> None:
    config = small_config(tmp_path, f"training.keep_by={keep_by}")
    add_checkpoint(config, 1, 5, {NE: 0.9, "epoch/requests": 7.0})
    add_checkpoint(config, 2, 9, {NE: 0.8})
    add_checkpoint(config, 2, 14, {})
    add_checkpoint(config, 3, 18, {NE: None})
    run = Path(config.storage) / "run"
    (add_checkpoint(config, 3, 20, {}) / STATE_FILE).unlink()
    (add_checkpoint(config, 3, 22, {}) / "__0_0.distcp").write_bytes(b"sha")
    (run / SNAPSHOT_FILE).write_bytes(damage)
    said: list[str] = []
    mend_snapshot(config, "run", said.append)
    assert len(said) == 1
    assert f"goes on from {name_of(3, 18)}, the last whole one" in said[0]
    assert (run / DAMAGED).read_bytes() == damage
    manager = as_ray_reads_it(config)
    assert Path(manager.latest_checkpoint_result.checkpoint.path).name == name_of(3, 18)
    assert [step_of(Path(result.checkpoint.path).name) for result in manager._checkpoint_results] == order
    metrics = {step_of(Path(r.checkpoint.path).name): r.metrics for r in manager._checkpoint_results}
    assert metrics[5] == {NE: 0.9, "epoch/requests": 7.0, "checkpoint_score": -0.9}
    assert metrics[14] == {"checkpoint_score": UNSCORED}
    assert metrics[18][NE] is None  # as Ray Train writes NaN

    made = (run / SNAPSHOT_FILE).read_bytes()  # which is whole, and left alone
    mend_snapshot(config, "run", said.append)
    assert (run / SNAPSHOT_FILE).read_bytes() == made
    assert len(said) == 1


def test_nothing_is_begun_anew_beside_checkpoints_that_are_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    said: list[str] = []
    mend_snapshot(config, "run", said.append)  # no run of that name
    (run := Path(config.storage) / "run").mkdir(parents=True)
    mend_snapshot(config, "run", said.append)  # Ray Train knows of none yet
    assert said == []
    assert list(run.iterdir()) == []
    (run / SNAPSHOT_FILE).write_text("")
    (add_checkpoint(config, 0, 2, {}) / STATE_FILE).unlink()  # half written
    mend_snapshot(config, "run", said.append)
    assert "there is none yet" in said[0]
    assert as_ray_reads_it(config).latest_checkpoint_result is None
    (run / SNAPSHOT_FILE).write_text("")
    torn = add_checkpoint(config, 0, 5, {})
    (torn / "__0_0.distcp").unlink()
    with pytest.raises(
        DataError, match=r"no checkpoint beside it is whole: .*__0_0.distcp is missing; move the folder"
    ):
        mend_snapshot(config, "run", said.append)
    assert (run / SNAPSHOT_FILE).read_text() == ""
    assert (torn / STATE_FILE).is_file()


def test_a_run_goes_on_behind_a_snapshot_that_was_cut_short(local_ray: None, tmp_path: Path) -> None:
    """A real one, cut off and then emptied."""
    small = ("source.requests=300", "tracking.enabled=false", "training.workers=1")
    config = small_config(tmp_path, *small, "training.epochs=1")
    prepare(config, "build", quiet)
    last = read_state(train(config, "run", quiet).checkpoint)
    snapshot = Path(config.storage) / "run" / SNAPSHOT_FILE
    for epochs, left in ((2, 0.5), (3, 0.0)):
        content = snapshot.read_bytes()
        assert json.loads(content)["current_report_index"]
        snapshot.write_bytes(content[: int(left * len(content))])
        lines: list[str] = []
        config = small_config(tmp_path, *small, f"training.epochs={epochs}")
        state = read_state(train(config, "run", lines.append).checkpoint)
        text = "\n".join(lines)
        assert f"goes on from {name_of(epochs - 1, last.step)}, the last whole one" in text
        assert f"resumed after epoch {epochs - 1}, step {last.step}" in text
        assert "which a run that was killed has left" not in text
        assert (state.epoch, state.trained["requests"]) == (epochs, last.trained["requests"])
        last = state

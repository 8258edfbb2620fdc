"""Ray Train's note of a run's checkpoints (its snapshot), mended where it was cut short.

Ray Train writes it over after every checkpoint, on a local or mounted file system not in one piece. A node that is lost
in that moment, or a full disk, leaves part of it or nothing, and Ray Train then refuses the run, or would begin it anew
beside its checkpoints. These say themselves whether they are whole, so the note is made again from them.
"""

from __future__ import annotations

import json
import math

import pyarrow.fs as pafs
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as SNAPSHOT_FILE
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

from roo_ray.config import Config
from roo_ray.errors import DataError
from roo_ray.redact import redact_text
from roo_ray.storage import join_path, open_filesystem, write_whole
from roo_ray.training.checkpoint import STATE_FILE, RunState, read_state
from roo_ray.training.progress import Say
from roo_ray.training.saver import KEEP_SCORE, keep_score, step_of

DAMAGED = f"{SNAPSHOT_FILE}.damaged"


def mend_snapshot(config: Config, run_name: str, say: Say) -> None:
    """Makes a run's snapshot again from its whole checkpoints where it does not parse, and keeps the damaged one beside
    it. No other job may be at work on the run. Raises DataError where there are checkpoints and none is whole."""
    path = join_path(config.storage, run_name, SNAPSHOT_FILE)
    filesystem, inner = open_filesystem(path)
    if not filesystem.get_file_info(inner).is_file:
        return
    with filesystem.open_input_stream(inner) as stream:
        content = bytes(stream.read())
    if _is_whole(content):
        return
    states, refused = checkpoints_in(filesystem, inner.rpartition("/")[0])
    if refused and not states:  # Ray Train would begin anew, and they would be removed
        raise DataError(
            f"{redact_text(path)} is damaged, and no checkpoint beside it is whole: {refused[0]}; move the folder of "
            f"run '{run_name}' away, or choose another run_name"
        )
    write_whole(join_path(config.storage, run_name, DAMAGED), content)
    write_whole(path, snapshot_of(config, states).encode())  # in one piece: without it they would be removed
    goes_on = f"the run goes on from {list(states)[-1]}, the last whole one" if states else "there is none yet"
    say(f"Ray Train's note of the checkpoints ({SNAPSHOT_FILE}) was cut short and is made again: {goes_on}")


def checkpoints_in(filesystem: pafs.FileSystem, folder: str) -> tuple[dict[str, RunState], list[str]]:
    """(states of the whole checkpoints in a run's folder by name, the oldest first; what is wrong with others)."""
    states, refused = {}, []
    listing = filesystem.get_file_info(pafs.FileSelector(folder))
    for item in sorted(listing, key=lambda item: item.base_name):
        if step_of(item.base_name) is None or not filesystem.get_file_info(f"{item.path}/{STATE_FILE}").is_file:
            continue
        try:
            states[item.base_name] = read_state(item.path, filesystem)
        except DataError as error:
            refused.append(str(error))
    return states, refused


def snapshot_of(config: Config, states: dict[str, RunState]) -> str:
    """What Ray Train would have written of these checkpoints (the oldest first), in its own form."""
    task = config.request_schema.labels[0].name
    results = []
    for name, state in states.items():
        metrics = {metric: math.nan if value is None else value for metric, value in state.metrics.items()}
        metrics[KEEP_SCORE] = keep_score(metrics, task)
        results.append(_TrainingResultState(checkpoint_dir_name=name, metrics=metrics))
    order = list(range(len(results)))
    if config.training.keep_by == "best":  # it lists the worst first, and removes from there
        order.sort(key=lambda index: (results[index].metrics[KEEP_SCORE], index))
    snapshot = _CheckpointManagerState(
        checkpoint_results=[results[index] for index in order],
        checkpoint_report_indices=order,
        latest_checkpoint_result=results[-1] if results else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    return str(snapshot.json())


def _is_whole(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False

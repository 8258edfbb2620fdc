"""Independent tasks of a build on Ray Data: results in order, the first failure as one clear error."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import ray

from roo_ray import session
from roo_ray.allocator import keep_freed_memory, return_freed_memory
from roo_ray.errors import BadInput, DataError, RooError, StorageError
from roo_ray.requests.stages import readable_failure
from roo_ray.requests.uniqueness import HasStaging
from roo_ray.storage import open_filesystem

SECONDS_BETWEEN_WORDS = 3.0
ABORT = "ABORT"

Say = Callable[[str], None]
Result = TypeVar("Result")


def _run_task(batch: pa.Table, plan: HasStaging, what: str) -> pa.Table:
    """Runs a task in a Ray Data worker; errors come back as values, so that one clear line reaches the user."""
    number = batch.column("number")[0].as_py()
    filesystem, staging = open_filesystem(plan.staging)
    outcome: tuple[str, Any]
    keep_freed_memory()
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own pool would give its large blocks back each time
    try:
        if filesystem.get_file_info(f"{staging}/{ABORT}").type != pafs.FileType.NotFound:
            outcome = ("skipped", None)
        else:
            function, arguments = pickle.loads(batch.column("task")[0].as_py())
            outcome = ("done", function(plan, *arguments))
    except Exception as error:
        readable = readable_failure(error, f"{what} (task {number})")
        kind = "refused" if isinstance(readable, BadInput) else "failed"
        trace = (
            "" if isinstance(readable, StorageError) or isinstance(error, RooError) else f"\n{traceback.format_exc()}"
        )
        outcome = (kind, str(readable) if kind == "refused" else f"{readable}{trace}")
    finally:
        return_freed_memory()
    return pa.table({"number": [number], "outcome": [pickle.dumps(outcome)]})


def run_tasks(
    plan: HasStaging,
    what: str,
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    progress: Say,
) -> list[Result]:
    """``function(plan, *task)`` for all tasks, in order. After a failure no further task begins, those at work
    end, and the failure of the first task in order is raised."""
    if not tasks:
        return []
    # the plan travels once, with the function, not with each task
    items = [{"number": number, "task": pickle.dumps((function, task))} for number, task in enumerate(tasks)]
    data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _run_task,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"plan": plan, "what": what},
        resources=session.placing().resources,
    )
    results: dict[int, Result] = {}
    failures: dict[int, RooError] = {}
    said = time.monotonic()
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for number, packed in zip(batch.column("number").to_pylist(), batch.column("outcome"), strict=True):
            state, value = pickle.loads(packed.as_py())
            if state == "done":
                results[number] = value
            elif state != "skipped":
                failures[number] = DataError(value) if state == "refused" else RooError(value)
                filesystem, staging = open_filesystem(plan.staging)
                filesystem.open_output_stream(f"{staging}/{ABORT}").close()
        if time.monotonic() - said > SECONDS_BETWEEN_WORDS:
            said = time.monotonic()
            progress(f"{what}: {len(results):,} of {len(tasks):,} tasks done")
    if failures:
        raise failures[min(failures)]
    if len(results) != len(tasks):
        raise RooError(f"{what}: {len(tasks) - len(results)} of {len(tasks)} tasks gave no result; run it again")
    return [results[number] for number in range(len(tasks))]

"""The reading function in Ray Data tasks: one pipeline per rank, one task and one block per window.

Tasks run on any node with a free CPU, so decoding, filtering, shuffling and packing leave the trainer's
process; its share is to view the blocks in shared memory as tensors. Blocks come in the order of the windows.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources

from roo_ray import session
from roo_ray.errors import BadInput
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import Window

_ERROR = "error"


def _read_block(block: pa.Table, settings: PackSettings) -> Iterator[pa.Table]:
    """Runs in a Ray Data task. Bad input travels as a row of its own: as an exception it would be wrapped and
    logged with some 200 lines of Ray's own frames."""
    for window in block.column("window").to_pylist():
        try:
            yield pack_window(settings, pickle.loads(window))
        except BadInput as error:
            yield pa.table({_ERROR: [pickle.dumps(error)]})
            return


def cpus_for_each_rank(world_size: int) -> int:
    """How many tasks of a rank's pipeline may run at once: the cluster's CPUs that no trainer holds, shared by
    the ranks; at least 1, as pipelines can take turns on a single CPU."""
    held = 0.0
    if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        held = ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0) * world_size
    return max(1, int((ray.cluster_resources().get("CPU", 1.0) - held) / world_size))


def read_with_ray_data(settings: PackSettings, windows: list[Window], world_size: int) -> Iterator[pa.Table]:
    """The packed tables of the windows, in their order, read by one execution of Ray Data.

    Raises the DataError of the reading function. Ray must be initialised.
    """
    if not windows:
        return
    session.quiet_data_context()
    items: list[dict[str, Any]] = [{"window": pickle.dumps(window)} for window in windows]
    blocks = ray.data.from_items(items, override_num_blocks=len(items))
    options = blocks.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources(cpu=cpus_for_each_rank(world_size))
    packed = blocks.map_batches(
        _read_block,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_kwargs={"settings": settings},
        num_cpus=1,
    )
    tables = iter(packed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    try:
        for table in tables:
            if _ERROR in table.column_names:
                raise pickle.loads(table.column(_ERROR)[0].as_py())
            yield table
    finally:
        close = getattr(tables, "close", None)
        if close is not None:
            close()

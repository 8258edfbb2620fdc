"""The ids of requests in a batch, from the shards they were read from: for errors, not for training."""

from __future__ import annotations

import numpy as np

from roo_ray.errors import RooError
from roo_ray.ingest.rows import read_requests
from roo_ray.ingest.stream import Step, StreamSettings
from roo_ray.sources.hashing import hash_rows

NAMED = 20  # request ids in an error, of each rank


def requests_by_rank(every: list[list[str]]) -> str:
    """Words for the request ids of each rank."""
    parts = []
    for rank, names in enumerate(every):
        if names:
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            parts.append(f"rank {rank}: {', '.join(names[:NAMED])}{more}")
    return "; ".join(parts) or "no rank can name them"


def request_ids(settings: StreamSettings, epoch: int, step: Step) -> list[str]:
    """``key=value`` of each request of a rank's step, in the order of the shards; its hash where it is not found in
    the windows that the step was made of."""
    wanted = np.unique(step.batch.request_key.cpu().numpy().astype(np.int64).view(np.uint64))
    keys = settings.schema.keys.request
    named: dict[int, str] = {}
    try:
        _, plans = settings.open()
        plan = plans.plan(epoch)
        for lane, (window, _) in step.position.items():
            for index in range(max(window - 1, 0), min(window + 1, plan.num_windows(lane))):
                units = plan.window(lane, index).units
                table = read_requests(settings.data_set, units, settings.schema, "skip", keys).table
                hashes = hash_rows(table, keys)
                for row in np.flatnonzero(np.isin(hashes, wanted)).tolist():
                    values = [f"{key}={table.column(key)[row].as_py()}" for key in keys]
                    named[int(hashes[row])] = "/".join(values)
    except (RooError, OSError, KeyError):
        pass  # the run is ending for another reason: the hashes name them too
    return [named.get(int(key), f"hash {int(key):016x}") for key in wanted]

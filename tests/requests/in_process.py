"""Runs the tasks of a build in this process: what they do, without the seconds that Ray takes to start."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from roo_ray.errors import BadInput, DataError, RooError
from roo_ray.requests.stages import readable_failure


def run_tasks(
    plan: Any, what: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], progress: Any
) -> list[Any]:
    """``tasks.run_tasks`` without Ray: all that a task takes and gives is pickled, as it is on its way to a worker."""
    results = []
    for number, task in enumerate(tasks):
        there, some = pickle.loads(pickle.dumps((plan, task)))
        try:
            results.append(pickle.loads(pickle.dumps(function(there, *some))))
        except Exception as error:
            failed = readable_failure(error, f"{what} (task {number})")
            raise (DataError if isinstance(failed, BadInput) else RooError)(str(failed)) from error
    return results

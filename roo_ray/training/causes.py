"""Which error of ours a failure of the worker group, or of a task that a worker waited for, comes from."""

from __future__ import annotations

import ray

from roo_ray.errors import RooError


def cause_of(errors: list[BaseException]) -> RooError | None:
    """The first error of ours among these and what they come from."""
    seen: list[BaseException] = []
    queue = list(errors)
    while queue:
        error = queue.pop(0)
        if error in seen:
            continue
        seen.append(error)
        linked = (getattr(error, "cause", None), error.__cause__, error.__context__)
        if isinstance(error, RooError) and not isinstance(error, ray.exceptions.RayTaskError):
            return error
        queue += [item for item in linked if isinstance(item, BaseException)]
    return None

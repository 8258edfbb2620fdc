"""How long a stopped job has for its last checkpoint.

``ray job stop`` sends SIGTERM to the driver, which hands it on to the trainers, and SIGKILL after the head's grace
period: ``RAY_JOB_STOP_WAIT_TIME_S`` where ``ray start --head`` runs, 3 s by default, which no checkpoint fits in. The
files in cluster/ set it, and jobs/preflight.py checks it.
"""

from __future__ import annotations

import math
import os

GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
RAY_DEFAULT_GRACE_S = 3.0


def grace_seconds() -> float:
    """Seconds that a job which is stopped has on this node, if it is the head. NaN where the variable is no whole
    number: Ray then fails to stop any job."""
    try:
        return float(int(os.environ.get(GRACE_VARIABLE, RAY_DEFAULT_GRACE_S)))  # as Ray reads it
    except ValueError:
        return math.nan


def stop_limit_s() -> float:
    """Seconds after SIGTERM by which this process must begin to end, to end well before SIGKILL; infinite where
    nothing says when that comes."""
    grace = grace_seconds() if GRACE_VARIABLE in os.environ else math.inf
    return math.inf if math.isnan(grace) else grace - min(30.0, grace / 4)

"""Which requests are trained on and which are held out for evaluation."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from roo_ray.config import Holdout
from roo_ray.errors import ConfigError
from roo_ray.requests.hashing import Hashes, mix64
from roo_ray.requests.manifest import Manifest, ShardFile

Side = Literal["train", "evaluation"]
_SALT = np.uint64(0x5E1F0D)


def files_of_side(manifest: Manifest, holdout: Holdout, side: Side) -> list[ShardFile]:
    """The files that hold requests of a side. Raises ConfigError where a side would be empty."""
    if holdout.by == "request":
        return list(manifest.files)
    days = manifest.days
    if len(days) <= holdout.days:
        raise ConfigError(
            f"holdout.days is {holdout.days} and the data set has {len(days)} days ({', '.join(days)}): nothing "
            "would be left to train on; lower holdout.days, or hold out by: request"
        )
    held_out = set(days[-holdout.days :])
    return [file for file in manifest.files if (file.day in held_out) == (side == "evaluation")]


def rows_of_side(request_hash: Hashes, holdout: Holdout, side: Side) -> npt.NDArray[np.bool_] | None:
    """(requests,) whether a request is of the side, by the hash of its key; None where all are."""
    if holdout.by == "day":
        return None
    share: Any = mix64(request_hash ^ _SALT).astype(np.float64) / 2.0**64
    held_out: npt.NDArray[np.bool_] = share < holdout.fraction
    return held_out if side == "evaluation" else ~held_out

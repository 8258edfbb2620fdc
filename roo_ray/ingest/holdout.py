"""Which part of a data set is trained on and which is held out for evaluation.

By day: whole files (a file holds one day). By request: rows, by a stable hash of the request key, so that the
same request is on the same side in every run, for every number of lanes and files.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from roo_ray.config import Holdout
from roo_ray.errors import DataError
from roo_ray.ingest.clustered import MIXED_DAYS
from roo_ray.ingest.plan import Side
from roo_ray.ingest.rows import read_requests
from roo_ray.ingest.units import units_of
from roo_ray.requests.manifest import Manifest, ShardFile
from roo_ray.schema import Schema
from roo_ray.sources.hashing import Hashes, hash_rows, mix64

# Buckets of build tasks come from the same key hash; without a salt a holdout could coincide with buckets.
_SALT = np.uint64(0x5EED_0F_401D_0007)

# Below this expected number of requests a side might be empty by chance, and is counted exactly:
# above it the chance is under exp(-30).
_SURELY_NOT_EMPTY = 30


def select_files(manifest: Manifest, holdout: Holdout, side: Side) -> list[ShardFile]:
    """The files that a side reads, in the manifest's order; by request, both sides read all files. Evaluation takes
    all days where there are no more than are held out.

    Raises DataError where the split leaves nothing to train on.
    """
    if not manifest.requests:
        raise DataError(f"version {manifest.version} of the data set has no requests; build it from more data")
    if holdout.by == "all" and side == "train":
        raise DataError("holdout.by=all holds everything out, which leaves nothing to train on; it is for evaluation")
    files = list(manifest.files)
    if holdout.by != "day" and not holdout.only_days:
        return files
    mixed = next((file for file in files if file.day == MIXED_DAYS), None)
    if mixed is not None:
        raise DataError(
            f"{mixed.path} holds requests of several days, so that days cannot be held out; set holdout.by=request, "
            "or write a file per day"
        )
    days = sorted({file.day for file in files if file.requests})
    if holdout.only_days:
        absent = sorted(set(holdout.only_days) - set(days))
        if absent:
            raise DataError(
                f"holdout.only_days names {absent[0]}, of which version {manifest.version} has no requests; it has "
                f"{days[0]} to {days[-1]}"
            )
        files = [file for file in files if file.day in holdout.only_days]
        days = sorted(holdout.only_days)
        if holdout.by != "day":
            return files
    if holdout.days >= len(days):
        if side == "evaluation":
            return files
        raise DataError(
            f"the data has {len(days)} day(s) ({days[0]} to {days[-1]}), and holding out the last "
            f"{holdout.days} leaves nothing to train on; lower holdout.days, or set holdout.by=request"
        )
    held_out = set(days[-holdout.days :])
    return [file for file in files if (file.day in held_out) == (side == "evaluation")]


def rows_of_side(keys: Hashes, holdout: Holdout, side: Side) -> npt.NDArray[np.bool_] | None:
    """Which rows belong to a side: keys (N,) uint64 are request key hashes -> (N,) bool, None for all."""
    if holdout.by != "request":
        return None
    held_out: npt.NDArray[np.bool_] = mix64(keys ^ _SALT) < np.uint64(int(holdout.fraction * 2**64))
    return held_out if side == "evaluation" else ~held_out


def check_sides(
    data_set: str,
    manifest: Manifest,
    schema: Schema,
    holdout: Holdout,
    side: Side = "train",
    on_bad_shard: Literal["fail", "skip"] = "fail",
) -> None:
    """Raises DataError where the side would be empty, and for training also where evaluation would.

    By request, reads the request keys only where the data is so small that a side may be empty by chance. Where some
    of it cannot be read, and that is to be skipped, nobody knows on which side it is: then no side counts as empty.
    """
    files = select_files(manifest, holdout, side)
    if holdout.by != "request":
        return
    smaller = min(holdout.fraction, 1 - holdout.fraction)
    if sum(file.requests for file in files) * smaller >= _SURELY_NOT_EMPTY:
        return
    units = units_of(files)
    refs = [units.ref(unit) for unit in range(len(units.file))]
    read = read_requests(data_set, refs, schema, on_bad_shard, schema.keys.request)
    if read.skipped:
        return
    keys = hash_rows(read.table, schema.keys.request)
    held_out = rows_of_side(keys, holdout, "evaluation")
    assert held_out is not None
    for name, count in (("evaluate", held_out.sum()), ("train", len(held_out) - held_out.sum())):
        if count == 0 and (side == "train" or name == "evaluate"):
            raise DataError(
                f"{data_set}: holdout.fraction={holdout.fraction} of {manifest.requests} requests leaves "
                f"nothing to {name} on; change holdout.fraction or build from more data"
            )

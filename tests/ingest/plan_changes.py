"""A change of every input of the plan, for the tests that each is noticed when a run is to go on."""

from __future__ import annotations

import json
from typing import Any

from roo_ray.config import Holdout, Ingest
from roo_ray.ingest.plan import plan_inputs
from roo_ray.requests.manifest import Manifest
from tests.ingest import shard_maker

SCHEMA = shard_maker.schema()
SHORTER = shard_maker.parse_schema(shard_maker.SCHEMA.replace("max_length: 4", "max_length: 3"))
RENAMED = SCHEMA.model_copy(update={"name": "another"})
INGEST = Ingest(lanes=4, batch_impressions=12, batch_cost=9.0, window_units=3)
MANIFEST = Manifest(version=1, schema_yaml="", schema_digest="", files=[])
BASE: dict[str, Any] = {
    "manifest": MANIFEST,
    "schema": SCHEMA,
    "holdout": Holdout(),
    "side": "train",
    "seed": 11,
    "mode": "shuffled",
    "cost": (1.0, 0.0, 0.0, 1.0, 0.0),
}

# what is changed -> (how, what is said)
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "data_version": ({"manifest": MANIFEST.model_copy(update={"version": 2})}, "data_version was 1 and is 2"),
    "data_digest": ({"manifest": MANIFEST.model_copy(update={"counts": {"rows_read": 1}})}, "data_digest was "),
    "schema_digest": ({"schema": RENAMED}, "schema_digest was "),
    "truncation": ({"schema": SHORTER}, "'history': 3"),
    "lanes": ({"lanes": 6}, "lanes was 4 and is 6"),
    "batch_impressions": ({"batch_impressions": 25}, "batch_impressions was 12 and is 25"),
    "batch_cost": ({"batch_cost": 8.5}, "batch_cost was 9.0 and is 8.5"),
    "cost_coefficients": ({"cost": (2.0, 0.0, 0.0, 1.0, 0.0)}, "cost_coefficients was [1.0, "),
    "oversize": ({"oversize": "split"}, "oversize was own and is split"),
    "interleave": ({"interleave": 2}, "interleave was None and is 2"),
    "window_units": ({"window_units": 2}, "window_units was 3 and is 2"),
    "drop_last": ({"drop_last": True}, "drop_last was False and is True"),
    "on_bad_shard": ({"on_bad_shard": "skip"}, "on_bad_shard was fail and is skip"),
    "holdout": ({"holdout": Holdout(by="request", fraction=0.2)}, "holdout was "),
    "holdout days": ({"holdout": Holdout(days=2)}, "'days': 2"),
    "holdout only_days": ({"holdout": Holdout(only_days=["2024-03-01"])}, "'only_days': ['2024-03-01']"),
    "side": ({"side": "evaluation"}, "side was train and is evaluation"),
    "seed": ({"seed": 12}, "seed was 11 and is 12"),
    "mode": ({"mode": "time"}, "mode was shuffled and is time"),
}


def inputs(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The plan's inputs, changed in something, as a checkpoint gives them back."""
    changes = changes or {}
    given = BASE | {name: value for name, value in changes.items() if name in BASE}
    ingest = INGEST.model_copy(update={name: value for name, value in changes.items() if name not in BASE})
    found = plan_inputs(
        given["manifest"],
        given["schema"],
        ingest,
        given["holdout"],
        given["side"],
        given["seed"],
        given["mode"],
        given["cost"],
    )
    return dict(json.loads(json.dumps(found)))

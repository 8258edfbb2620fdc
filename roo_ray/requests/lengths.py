"""How many ids a request has of each id feature, in the mean: counted by the build, read from the manifest.

The ledger counts every column's values. Of columns that features read as lists it counts beside them what their
``max_length`` leaves (``kept``), so that the mean is that of what is looked up. Data sets without a ledger
(impression tables as they are) are estimated from the footers of some of their files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.requests.manifest import Manifest, ShardFile
from roo_ray.schema import Feature, Schema
from roo_ray.sources.base import leaf_columns, open_parquet
from roo_ray.sources.columns import as_array, is_list, list_parts
from roo_ray.storage import open_filesystem

KEPT = "kept"
FOOTERS = 16  # files whose footers are read where nothing was counted
SHOWN = 12

Kept = dict[str, dict[str, int]]


def id_columns(schema: Schema) -> Iterator[tuple[str, Feature, str]]:
    """(name in the lookup, feature, column) of every column of ids: ``item``, and ``history.item`` for the column
    ``item`` of the sequence ``history``."""
    for feature in schema.features:
        if feature.kind == "sequence":
            for event in feature.sequence_ids:
                yield f"{feature.name}.{event.column}", feature, event.column
        elif feature.kind == "ids":
            yield feature.name, feature, feature.columns[0]


def _has_lists(feature: Feature) -> bool:
    return feature.kind == "sequence" or feature.pooling != "none"


def _cut_at(feature: Feature) -> str:
    return "all" if feature.max_length is None else str(feature.max_length)


def count_kept(requests: pa.Table, schema: Schema) -> Kept:
    """Column -> ``max_length`` of a feature that reads it as lists (``all`` without one) -> ids that are left of all
    its lists in these request rows. A list per request, or per impression; null lists are empty, and single values
    are lists of one, null ones empty."""
    counts: Kept = {}
    for _, feature, column in id_columns(schema):
        if not _has_lists(feature) or _cut_at(feature) in counts.get(column, {}):
            continue
        array = as_array(requests.column(column))
        if feature.level == "impression":
            array = list_parts(array)[1]
        lengths = list_parts(array)[0] if is_list(array.type) else np.asarray(array.is_valid()).astype(np.int64)
        if feature.max_length is not None:
            lengths = np.minimum(lengths, feature.max_length)
        counts.setdefault(column, {})[_cut_at(feature)] = int(lengths.sum())
    return counts


@dataclass(frozen=True)
class MeanIds:
    """``per_request``: mean ids of a request by name in the lookup, cut to the features' ``max_length``;
    impression-level features have those of all the request's impressions. ``how`` they are known, in words."""

    per_request: dict[str, float]
    how: str

    def describe(self) -> str:
        """One line of text, of the features with the most ids."""
        most = sorted(self.per_request.items(), key=lambda item: -item[1])
        means = ", ".join(f"{name} {mean:,.2f}" for name, mean in most[:SHOWN])
        more = f" and {len(most) - SHOWN} more" if len(most) > SHOWN else ""
        return f"mean ids per request: {means or 'no id features'}{more} ({self.how})"


def mean_ids(schema: Schema, manifest: Manifest, data_set: str) -> MeanIds:
    """Mean ids per request of each id feature of ``schema``, over all requests of a version of ``data_set``.

    Counted at the build, they are exact where the data set's own schema cuts the feature to the same
    ``max_length``; with another one, and in versions that counted only all values, the mean is cut instead of each
    list, which is at most too high. Without a ledger, some files' footers stand in; where none can be read, history
    events are divided evenly among the sequences and a bag counts as one id. ``how`` says so.
    """
    requests = max(manifest.requests, 1)
    impressions = manifest.impressions / requests
    tokens = manifest.tokens / requests / max(len(schema.sequences), 1)
    columns: Mapping[str, Any] = manifest.ledger.get("columns", {})
    how = "counted when the data set was built"
    found: dict[str, float] = {}
    if not columns:
        found, how = _from_footers(schema, manifest, data_set)
    means: dict[str, float] = {}
    mean_cut: list[str] = []
    for name, feature, column in id_columns(schema):
        lists = impressions if feature.level == "impression" else 1.0
        kept = columns.get(column, {}).get(KEPT, {}).get(_cut_at(feature))
        if not _has_lists(feature):
            means[name] = lists
        elif kept is not None:
            means[name] = kept / requests
        else:
            total = columns[column]["elements"]["request"] / requests if column in columns else found.get(column)
            if total is None:
                total = tokens if feature.kind == "sequence" else lists
            most = lists * feature.max_length if feature.max_length is not None else total
            means[name] = min(total, most)
            if column in columns and feature.max_length is not None:
                mean_cut.append(name)
    if mean_cut:
        how += f"; the mean, not each list, is cut to max_length: {', '.join(mean_cut)}"
    return MeanIds(means, how)


def sequence_shares(schema: Schema, manifest: Manifest, ids: MeanIds) -> dict[str, float]:
    """Sequence -> its kept events per history event of the manifest (which counts those of all sequences, uncut).
    Empty where the manifest has none."""
    tokens = manifest.tokens / max(manifest.requests, 1)
    if not tokens:
        return {}
    return {f.name: ids.per_request[f"{f.name}.{f.sequence_ids[0].column}"] / tokens for f in schema.sequences}


# ---- without a ledger ----------------------------------------------------------------------------


def _from_footers(schema: Schema, manifest: Manifest, data_set: str) -> tuple[dict[str, float], str]:
    """(column -> mean ids per request, how): of files spread evenly over the data set. Files of an impression table
    have a row per impression: a request-level list weighs there as often as its request was shown anything."""
    step = max(1, -(-len(manifest.files) // FOOTERS))
    wanted = {column for _, feature, column in id_columns(schema) if _has_lists(feature)}
    values, rows, read, by_impression = dict.fromkeys(wanted, 0), 0, 0, False
    for file in manifest.files[::step] if wanted else []:
        try:
            own, count = _values_of(file, data_set, wanted)
        except (DataError, OSError, pa.ArrowException):
            continue  # a shard that cannot be read is told, or skipped, where it is trained on
        values = {column: values[column] + own.get(column, 0) for column in wanted}
        rows, read, by_impression = rows + count, read + 1, _is_impressions(file)
    if not rows:
        return {}, "not counted: history events divided evenly among the sequences, a bag taken as one id"
    impressions = manifest.impressions / max(manifest.requests, 1)
    means = {
        column: values[column] / rows * (impressions if by_impression and column in schema.impression_columns else 1.0)
        for column in wanted
    }
    how = f"estimated from the footers of {read} of {len(manifest.files)} files; the mean is cut to max_length"
    return means, how


def _is_impressions(file: ShardFile) -> bool:
    return bool(file.units) and file.units[0].first_row is not None


def _values_of(file: ShardFile, data_set: str, wanted: set[str]) -> tuple[dict[str, int], int]:
    """(column -> its values that are not null, rows) of a file, from its footer."""
    if _is_impressions(file):
        parquet = open_parquet(file.path, open_filesystem(file.path)[1])
    else:
        parquet = open_parquet(data_set, f"{open_filesystem(data_set)[1]}/{file.path}")
    with parquet:
        metadata = parquet.metadata
    return _footer_values(metadata, wanted), metadata.num_rows


def _footer_values(metadata: pq.FileMetaData, wanted: set[str]) -> dict[str, int]:
    values: dict[str, int] = {}
    for leaf, name in enumerate(leaf_columns(metadata)):
        if name not in wanted:
            continue
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(leaf)
            # a null or empty list is a value of the footer too, a null one
            known = column.statistics if column.is_stats_set else None
            nulls = known.null_count if known is not None and known.has_null_count else 0
            values[name] = values.get(name, 0) + column.num_values - nulls
    return values

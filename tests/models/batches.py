"""Random request batches of any schema, for tests of models."""

from __future__ import annotations

import torch
from torch import Tensor

from roo_ray.ingest.batch import Jagged, RequestBatch, impression_id_keys, request_id_keys
from roo_ray.schema import Schema, parse_schema

SCHEMA = """
name: test
keys: {request: request_id, user: user_id, time: request_time}
tables:
  item: {rows: 50, dim: 8}
  topic: {rows: 6, dim: 8}
  word: {rows: 30, dim: 4}
  tag: {rows: 20, dim: 4}
features:
  - {name: profile, level: request, kind: dense, columns: [age, activity]}
  - {name: country, level: request, kind: ids, columns: country_id, table: topic}
  - {name: interests, level: request, kind: ids, columns: liked, table: tag, pooling: mean, max_length: 4}
  - name: history
    level: request
    kind: sequence
    max_length: 12
    time: history_time
    sequence: [{column: history_item, table: item}, {column: history_topic, table: topic}, history_dwell]
  - name: searches
    level: request
    kind: sequence
    max_length: 5
    sequence: [{column: search_word, table: word}]
  - {name: item, level: impression, kind: ids, columns: item_id, table: item}
  - {name: topic, level: impression, kind: ids, columns: topic_id, table: topic}
  - {name: words, level: impression, kind: ids, columns: word_ids, table: word, pooling: sum, max_length: 3}
  - {name: tags, level: impression, kind: ids, columns: tag_ids, table: tag, pooling: mean, max_length: 3}
  - {name: price, level: impression, kind: dense, columns: [price, distance, freshness]}
labels:
  - {name: click, column: clicked}
  - {name: buy, column: bought, weight: 0.5}
"""


def schema() -> Schema:
    """Two tasks; tables of two dims, shared between history and candidates; two sequences, one without a time;
    bags on both levels, sum and mean."""
    return parse_schema(SCHEMA)


def random_batch(
    schema: Schema,
    num_impressions: list[int],
    seed: int,
    *,
    history_lengths: list[int] | None = None,
    empty_history: float = 0.2,
    known: float = 0.9,
) -> RequestBatch:
    """A batch with ragged histories and bags (a share ``empty_history`` of the lists is empty) and labels of
    which a share ``known`` is not null. ``history_lengths``: of all sequences, cut to their ``max_length``."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(num_impressions)
    requests, impressions = len(num_impressions), int(counts.sum())

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def lengths(rows: int, longest: int) -> Tensor:
        drawn = torch.randint(1, longest + 1, (rows,), generator=generator)
        return torch.where(uniform(rows) < empty_history, 0, drawn)

    def ids(table: str, lists: Tensor) -> Jagged:
        rows = schema.tables[table].rows
        if schema.tables[table].managed:  # more ids than rows; 0 is no id
            return Jagged(torch.randint(1, 4 * rows, (int(lists.sum()),), generator=generator), lists)
        return Jagged(torch.randint(0, rows, (int(lists.sum()),), generator=generator), lists)

    list_lengths: dict[str, Tensor] = {}
    for feature in schema.features:
        if feature.kind == "dense":
            continue
        rows = requests if feature.level == "request" else impressions
        if feature.kind == "ids" and feature.pooling == "none":
            list_lengths[feature.name] = torch.ones(rows, dtype=torch.int64)
        elif feature.kind == "sequence" and history_lengths is not None:
            list_lengths[feature.name] = torch.tensor(history_lengths).clamp(max=feature.max_length)
        else:
            list_lengths[feature.name] = lengths(rows, feature.max_length or 4)

    request_time = 1.7e9 + 86400.0 * uniform(requests).double()
    times, dense = {}, {}
    for feature in schema.sequences:
        of = list_lengths[feature.name]
        total = int(of.sum())
        dense[feature.name] = uniform(total, len(feature.sequence_dense))
        if feature.time:
            ages = torch.cat([(10.0 ** (7 * uniform(int(n)))).sort(descending=True).values for n in of])
            times[feature.name] = request_time.repeat_interleave(of) - ages.double() - 1.0
    tasks = len(schema.labels)
    weights = (uniform(impressions, tasks) < known).float()
    return RequestBatch(
        num_impressions=counts,
        request_key=torch.arange(requests) + 1000 * seed,
        impression_index=torch.cat([torch.arange(n) for n in num_impressions]),
        user_key=torch.arange(requests) % 7,
        request_time=request_time,
        request_dense=uniform(requests, schema.dense_width("request")) * 50,
        impression_dense=uniform(impressions, schema.dense_width("impression")) - 0.5,
        request_ids={key: ids(table, list_lengths[key.split(".")[0]]) for key, table in request_id_keys(schema)},
        sequence_dense=dense,
        sequence_time=times,
        impression_ids={key: ids(table, list_lengths[key]) for key, table in impression_id_keys(schema)},
        labels=(uniform(impressions, tasks) < 0.3).float() * weights,
        weights=weights,
        oracle=torch.full((impressions, tasks), float("nan")),
    )


def take_requests(batch: RequestBatch, rows: list[int]) -> RequestBatch:
    """The given requests, in that order."""
    index = torch.tensor(rows)
    impressions = torch.arange(batch.total_impressions)
    chosen = Jagged(impressions, batch.num_impressions).take(index).values
    of_sequence = {key.split(".")[0]: ids.lengths for key, ids in batch.request_ids.items() if "." in key}

    def tokens(name: str, values: Tensor) -> Tensor:
        return Jagged(values, of_sequence[name]).take(index).values

    return RequestBatch(
        num_impressions=batch.num_impressions[index],
        request_key=batch.request_key[index],
        impression_index=batch.impression_index[chosen],
        user_key=batch.user_key[index],
        request_time=batch.request_time[index],
        request_dense=batch.request_dense[index],
        impression_dense=batch.impression_dense[chosen],
        request_ids={k: v.take(index) for k, v in batch.request_ids.items()},
        sequence_dense={k: tokens(k, v) for k, v in batch.sequence_dense.items()},
        sequence_time={k: tokens(k, v) for k, v in batch.sequence_time.items()},
        impression_ids={k: v.take(chosen) for k, v in batch.impression_ids.items()},
        labels=batch.labels[chosen],
        weights=batch.weights[chosen],
        oracle=batch.oracle[chosen],
    )


def take_impressions(batch: RequestBatch, order: Tensor) -> RequestBatch:
    """The impressions in another order; ``order`` (B_NRO,) must stay within each request."""
    fields = dict(vars(batch))
    for name in ("impression_index", "impression_dense", "labels", "weights", "oracle"):
        fields[name] = fields[name][order]
    fields["impression_ids"] = {k: v.take(order) for k, v in batch.impression_ids.items()}
    return RequestBatch(**fields)

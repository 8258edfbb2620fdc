"""What a model's config asks for against what the schema, the stack and the device can do: a driver asks here, before
it starts workers or reads data."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from roo_ray.config import Embeddings, Model
from roo_ray.errors import ConfigError
from roo_ray.models.embeddings import lookup_features
from roo_ray.models.ranking import make_towers
from roo_ray.schema import Schema

COLUMNS = 4  # fused kernels want an embedding dim that is a multiple of this


def check_model(schema: Schema, settings: Model, device_type: str) -> None:
    """Raises ConfigError, a line per problem, where a model of ``settings`` cannot be trained on data of ``schema``:
    options of ``model.embeddings`` that the device (``cpu`` or ``cuda``) or the lookup cannot do, embedding dims
    that the kernels do not take, features and labels that the schema does not have, towers that cannot be imported.
    Cheap: towers are made without memory, tables not at all."""
    problems = []
    try:
        tables = lookup_features(schema)
    except ConfigError as error:
        raise ConfigError(f"the model cannot be made: {error}") from None
    if not tables:
        problems.append(f"schema '{schema.name}' has no id feature and no sequence: there is nothing to look up")
    problems += [
        f"table '{table}' of schema '{schema.name}' has dim {schema.tables[table].dim}; make it a multiple of "
        f"{COLUMNS}, which is what the lookup's kernels take"
        for table in tables
        if schema.tables[table].dim % COLUMNS
    ]
    problems += embedding_problems(settings.embeddings, tables, device_type)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            make_towers(schema, settings)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n  ".join(problems))


def refuse_what_cannot_be(embeddings: Embeddings, tables: Iterable[str], device_type: str) -> None:
    """Raises ConfigError, one line per option of ``model.embeddings`` that the device or the lookup cannot do."""
    problems = embedding_problems(embeddings, tables, device_type)
    if problems:
        raise ConfigError("\n  ".join(problems))


def embedding_problems(embeddings: Embeddings, tables: Iterable[str], device_type: str) -> list[str]:
    """One line per option of ``model.embeddings`` that the device or the lookup of ``tables`` cannot do."""
    known = set(tables)
    problems = [
        f"model.embeddings.{option} names table '{table}', which nothing looks up (there are {sorted(known)})"
        for option, names in (("sharding", embeddings.sharding), ("uvm", embeddings.uvm))
        for table in names
        if table not in known
    ]
    problems += [
        f"model.embeddings.sharding of '{table}' is grid, which shards pooled tables alone; roo_ray looks sequences "
        "up and pools after it: take row_wise, column_wise or table_wise"
        for table, kind in embeddings.sharding.items()
        if kind == "grid"
    ]
    if device_type == "cpu":
        problems += [
            f"model.embeddings.sharding of '{table}' is data_parallel, whose gradients are wrong on CPU: take "
            "table_wise"
            for table, kind in embeddings.sharding.items()
            if kind == "data_parallel"
        ]
        for condition, message in (
            (embeddings.weights == "bf16", "weights bf16 do not exist on CPU: take fp32 or fp16"),
            (
                embeddings.optimizer in ("adam", "lamb"),
                f"optimizer {embeddings.optimizer} has no fused form on CPU: take rowwise_adagrad, adagrad or sgd",
            ),
            (embeddings.index_dedup, "index_dedup has no operator on CPU: set it to false"),
            (bool(embeddings.uvm), "uvm is host memory beside a GPU: take the tables out of it"),
        ):
            problems += [f"model.embeddings.{message}"] if condition else []
    return problems

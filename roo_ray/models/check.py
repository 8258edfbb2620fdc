"""What a model's config asks for against what the schema, the stack and the device can do: a driver asks here, before
it starts workers or reads data."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable

import torch

from roo_ray.config import Embeddings, ManagedRows, Model
from roo_ray.errors import ConfigError
from roo_ray.models.contract import RequestOnlyModel
from roo_ray.models.embeddings import lookup_features
from roo_ray.models.normalise import plain_batch_norms
from roo_ray.models.pooled import pooled_problems
from roo_ray.models.ranking import make_towers
from roo_ray.schema import Schema

COLUMNS = 4  # fused kernels want an embedding dim that is a multiple of this
_LATE = frozenset({"dcn", "hstu", "hstu_targets", "cross_attention"})
_HSTU = frozenset({"hstu", "hstu_targets", "cross_attention", "two_tower", "retrieval"})
# keys of the model config that not every kind uses, and the kinds that do
USED_BY = {
    "layers": _HSTU,
    "heads": _HSTU,
    "attention_layers": frozenset({"cross_attention"}),
    "history_pooling": frozenset({"dcn"}),
    "score": frozenset({"two_tower"}),
    **dict.fromkeys(("cross_layers", "cross_rank", "tower", "task_heads", "experts"), _LATE),
    **dict.fromkeys(("temperature", "positive", "item", "log_q"), frozenset({"retrieval"})),
}


def check_model(schema: Schema, settings: Model, device_type: str) -> list[str]:
    """What is to be known of a model that can be trained, a line each: keys of the config that do nothing, plain
    BatchNorm in a team's own towers. Raises ConfigError, a line per problem, where a model of ``settings`` cannot be
    trained on data of ``schema``: options of ``model.embeddings`` that the device (``cpu`` or ``cuda``) or the lookup
    cannot do, embedding dims that the kernels do not take, features and labels that the schema does not have, towers
    that cannot be imported. Cheap: towers are made without memory (where they can be; else for real), tables not at
    all."""
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
    problems += [
        f"model.embeddings.uvm names table '{table}', which the schema has as managed: its rows change hands on the "
        "device; take it out of uvm, or give it hash: true instead"
        for table in settings.embeddings.uvm
        if table in tables and schema.tables[table].managed
    ]
    problems += pooled_problems(schema, [table for table in settings.embeddings.pooled if table in tables])
    notes = unused_keys(settings)
    if settings.embeddings.managed != ManagedRows() and not any(schema.tables[table].managed for table in tables):
        notes.append(f"model.embeddings.managed does nothing: schema '{schema.name}' has no table with managed: true")
    try:
        notes += plain_batch_norms(_try_towers(schema, settings))
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n  ".join(problems))
    return notes


def unused_keys(settings: Model) -> list[str]:
    """Lines that name the keys of the model config which change nothing. A key with its default is not named: a config
    from a checkpoint has all keys. Nor is one beside a team's own towers, which may use any."""
    if settings.towers is not None:
        return []
    default = Model()
    changed = {key for key in USED_BY if getattr(settings, key) != getattr(default, key)}
    unused = [key for key, kinds in USED_BY.items() if key in changed and settings.kind not in kinds]
    lines = []
    if unused:
        named = ", ".join(f"{key}={getattr(settings, key)}" for key in unused)
        lines.append(f"model.kind {settings.kind} does not use {named}: take them out, or another kind")
    if "experts" in changed - set(unused) and settings.task_heads != "mmoe":
        lines.append(f"model.experts={settings.experts} does nothing without model.task_heads=mmoe")
    return lines


def _try_towers(schema: Schema, settings: Model) -> RequestOnlyModel:
    """The towers, perhaps without memory. Raises ConfigError where they cannot be made, whatever they raise."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make_towers(schema, settings)
        except ConfigError:
            raise
        except Exception:  # a team's own towers may look at a value, which meta tensors do not have
            pass
        try:
            return make_towers(schema, settings)
        except Exception as error:
            named = f"towers '{settings.towers}'" if settings.towers else f"kind '{settings.kind}'"
            file = getattr(sys.modules.get((settings.towers or "").partition(":")[0]), "__file__", None)
            frames = traceback.extract_tb(error.__traceback__)
            where = ([frame for frame in frames if frame.filename == file] or frames)[-1]  # in the team's own file
            raise ConfigError(
                f"model.{named} cannot be made of this schema and model config: {type(error).__name__}: {error} "
                f"(line {where.lineno} of {where.name} in {os.path.basename(where.filename)})"
            ) from error


def evaluated_as(settings: Model, device_type: str) -> Model:
    """``settings`` where a model is only evaluated: how its tables were placed and updated in training does not matter
    then, and may be what a GPU alone can do. Which are pooled and how ids get rows stays, and their type where the
    device has it; else it is fp32."""
    stored = settings.embeddings.weights
    weights = "fp32" if stored == "bf16" and device_type == "cpu" else stored
    kept = Embeddings(weights=weights, pooled=settings.embeddings.pooled, managed=settings.embeddings.managed)
    return settings.model_copy(update={"embeddings": kept})


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
        for option, names in (
            ("sharding", embeddings.sharding),
            ("uvm", embeddings.uvm),
            ("pooled", dict.fromkeys(embeddings.pooled)),
        )
        for table in names
        if table not in known
    ]
    unpooled = {table: kind for table, kind in embeddings.sharding.items() if table not in embeddings.pooled}
    problems += [
        f"model.embeddings.sharding of '{table}' is grid, which shards pooled tables alone: take row_wise, column_wise "
        "or table_wise, or name it in model.embeddings.pooled if bags alone read it"
        for table, kind in unpooled.items()
        if kind == "grid"
    ]
    if device_type == "cpu":
        problems += [
            f"model.embeddings.sharding of '{table}' is data_parallel, whose gradients are wrong on CPU where a table "
            "is not pooled: take table_wise"
            for table, kind in unpooled.items()
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

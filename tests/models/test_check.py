"""What a driver can refuse before any worker starts: all problems of a model's config in one message."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from roo_ray.config import Embeddings, Model
from roo_ray.errors import ConfigError
from roo_ray.models.architectures import ARCHITECTURES
from roo_ray.models.check import check_model, refuse_what_cannot_be, unused_keys
from roo_ray.models.objective import training_loss
from roo_ray.schema import parse_schema
from tests.models.batches import SCHEMA, random_batch, schema
from tests.models.test_parity import build


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_can_be_trained_is_not_refused(kind: str) -> None:
    check_model(schema(), Model(kind=kind), "cpu")  # type: ignore[arg-type]
    check_model(schema(), Model(kind=kind, embeddings=Embeddings(weights="bf16", uvm=["item"])), "cuda")  # type: ignore[arg-type]


def test_all_problems_come_in_one_message() -> None:
    settings = Model(
        kind="retrieval",
        positive="like",
        embeddings=Embeddings(weights="bf16", uvm=["item"], sharding={"user": "row_wise"}),
    )
    with pytest.raises(ConfigError) as error:
        check_model(schema(), settings, "cpu")
    for part in ("weights bf16", "uvm is host memory", "names table 'user'", "model.positive 'like'"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=r"position_feature 'place' is no impression-level dense column"):
        check_model(schema(), Model(position_feature="place"), "cpu")
    with pytest.raises(ConfigError, match="cannot be imported"):
        check_model(schema(), Model(towers="no.such.module:Towers"), "cpu")


def test_schemas_that_cannot_be_looked_up_are_refused() -> None:
    odd = parse_schema(SCHEMA.replace("tag: {rows: 20, dim: 4}", "tag: {rows: 20, dim: 6}"))
    with pytest.raises(ConfigError, match=r"table 'tag' of schema 'test' has dim 6; make it a multiple of 4"):
        check_model(odd, Model(), "cpu")


def test_what_a_cpu_cannot_do_is_refused_in_one_message() -> None:
    tables = ["item", "topic"]
    wrong = Embeddings(
        weights="bf16",
        optimizer="adam",
        index_dedup=True,
        uvm=["item"],
        sharding={"item": "data_parallel", "topic": "grid", "user": "row_wise"},
    )
    with pytest.raises(ConfigError) as error:
        refuse_what_cannot_be(wrong, tables, "cpu")
    for part in (
        "weights bf16 do not exist on CPU",
        "optimizer adam has no fused form on CPU",
        "index_dedup has no operator on CPU",
        "uvm is host memory beside a GPU",
        "'item' is data_parallel, whose gradients are wrong on CPU",
        "'topic' is grid",
        "sharding names table 'user'",
    ):
        assert part in str(error.value)
    fine = Embeddings(weights="bf16", optimizer="adam", index_dedup=True, uvm=["item"])
    refuse_what_cannot_be(fine, tables, "cuda")
    refuse_what_cannot_be(Embeddings(), tables, "cpu")


def test_towers_that_fail_are_named_whatever_they_raise() -> None:
    check_model(schema(), Model(towers="tests.models.own_towers:OwnTowers"), "cpu")
    check_model(schema(), Model(towers="tests.models.own_towers:LookingTowers"), "cpu")
    broken = Model(towers="tests.models.own_towers:BrokenTowers", embeddings=Embeddings(sharding={"user": "row_wise"}))
    with pytest.raises(ConfigError) as error:
        check_model(schema(), broken, "cpu")
    for part in ("names table 'user'", "model.towers 'tests.models.own_towers:BrokenTowers' cannot be made",
                 "AttributeError", "'width'", "in own_towers.py"):  # fmt: skip
        assert part in str(error.value)


def test_what_is_to_be_known_of_a_model_is_told() -> None:
    assert check_model(schema(), Model(), "cpu") == []
    (line,) = check_model(schema(), Model(towers="tests.models.own_towers:WithBatchNorm", score="mlp"), "cpu")
    assert line.startswith("the towers' module norm is BatchNorm1d: its statistics are skewed")
    settings = Model(kind="two_tower", task_heads="mmoe", experts=3, tower=[8], log_q=True)
    (line,) = check_model(schema(), settings, "cpu")
    assert line.startswith("model.kind two_tower does not use tower=[8], task_heads=mmoe, experts=3: take them out")
    assert check_model(schema(), Model(experts=3), "cpu") == [
        "model.experts=3 does nothing without model.task_heads=mmoe"
    ]
    assert check_model(schema(), Model(experts=3, task_heads="mmoe"), "cpu") == []


# of every key that is no embedding's: another value, and what it needs to matter
OTHERS: dict[str, dict[str, Any]] = {
    "dim": {"dim": 16}, "layers": {"layers": 1}, "heads": {"heads": 1}, "attention_layers": {"attention_layers": 1},
    "history_pooling": {"history_pooling": "mean"}, "user_dim": {"user_dim": 16}, "cross_layers": {"cross_layers": 1},
    "cross_rank": {"cross_rank": 2}, "tower": {"tower": [4]}, "normalisation": {"normalisation": "rms"},
    "task_heads": {"task_heads": "mmoe"}, "experts": {"task_heads": "mmoe", "experts": 2}, "score": {"score": "mlp"},
    "position_feature": {"position_feature": "distance"}, "dropout": {"dropout": 0.3},
    "stochastic_length": {"stochastic_length": 1.1}, "temperature": {"temperature": 0.5},
    "positive": {"positive": "buy"}, "item": {"item": "topic"}, "log_q": {"log_q": False},
}  # fmt: skip


def _trained(options: dict[str, Any]) -> tuple[dict[str, torch.Size], torch.Tensor]:
    """The shapes of a model's weights, and its loss in training."""
    model = build(**options)
    batch = random_batch(schema(), [9, 8, 20], 2, empty_history=0.0, known=1.0)  # items come twice
    _, loss = training_loss(model, batch, torch.ones(2), torch.ones(2), 1)
    return {name: weight.shape for name, weight in model.named_parameters()}, loss.detach()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_keys_that_change_nothing_are_the_ones_that_are_named(kind: str) -> None:
    assert set(OTHERS) == set(Model.model_fields) - {"kind", "towers", "embeddings", "position_value"}
    for key, options in OTHERS.items():
        without = {name: value for name, value in options.items() if name != key}
        (shapes, loss), (plain, plain_loss) = _trained({"kind": kind, **options}), _trained({"kind": kind, **without})
        same = torch.equal(loss, plain_loss) and shapes == plain
        lines = unused_keys(Model(kind=kind, **options))  # type: ignore[arg-type]
        assert same == any(f"{key}=" in line for line in lines), f"{key}: {lines}"


@pytest.mark.parametrize("tower", [[0], [64, -8]])
def test_widths_of_the_tower_are_positive(tower: list[int]) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        Model(tower=tower)

"""What a driver can refuse before any worker starts: all problems of a model's config in one message."""

import pytest

from roo_ray.config import Embeddings, Model
from roo_ray.errors import ConfigError
from roo_ray.models.architectures import ARCHITECTURES
from roo_ray.models.check import check_model, refuse_what_cannot_be
from roo_ray.schema import parse_schema
from tests.models.batches import SCHEMA, schema


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

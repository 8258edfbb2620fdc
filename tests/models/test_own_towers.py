"""A team's own towers come in by config, with parity; what is no such thing is refused."""

from pathlib import Path

import pytest

from roo_ray.errors import ConfigError
from tests.models import own_towers
from tests.models.batches import random_batch, schema
from tests.models.test_parity import assert_parity, build

SCHEMA = schema()


def test_own_towers_have_parity() -> None:
    model = build(towers="tests.models.own_towers:OwnTowers")
    assert type(model.dense).__name__ == "OwnTowers"
    batch = random_batch(SCHEMA, [3, 1, 4], 2)
    assert_parity(model, batch, batch.explode())


def test_the_example_in_the_docs_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    code = Path(own_towers.__file__).read_text()
    example = code[code.index("class OwnTowers") : code.index("class WithBatchNorm")].strip()
    assert example in text


def test_plain_batch_norm_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="norm is BatchNorm1d: its statistics are skewed"):
        build(towers="tests.models.own_towers:WithBatchNorm")


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ("tests.models.nowhere:Towers", "cannot be imported"),
        ("tests.models.own_towers:Missing", "cannot be imported"),
        ("roo_ray.config:Model", "is no RequestOnlyModel"),
    ],
)
def test_what_is_no_towers_is_refused(towers: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(towers=towers)

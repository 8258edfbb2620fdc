"""The schema is a contract: what contradicts itself is refused with the feature's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from roo_ray.errors import ConfigError
from roo_ray.schema import Schema, load_schema, parse_schema

SCHEMAS = Path(__file__).parents[1] / "configs/schemas"

BASE = """
name: small
keys: {request: r, user: u, time: t, impression: item}
tables: {item: {rows: 10, dim: 4}}
features:
  - {name: history, level: request, kind: sequence, max_length: 5, time: ht,
     sequence: [{column: h, table: item}, hd]}
  - {name: age, level: request, kind: dense, columns: age}
  - {name: item, level: impression, kind: ids, columns: item, table: item}
labels: [{name: click, column: clicked}]
"""


def changed(path: str, value: object) -> str:
    """BASE with the value at a dotted path replaced."""
    content = yaml.safe_load(BASE)
    *parents, last = path.split(".")
    node = content
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
    return yaml.safe_dump(content)


def test_columns_by_level() -> None:
    schema = parse_schema(BASE)
    assert schema.request_columns == ["r", "u", "t", "h", "hd", "ht", "age"]
    assert schema.impression_columns == ["item", "clicked"]
    assert schema.dense_width("request") == 1


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.yaml")), ids=lambda path: path.name)
def test_yaml_round_trip(path: Path) -> None:
    schema = load_schema(path)
    again = parse_schema(schema.to_yaml())
    assert again == schema
    assert again.digest == schema.digest


def test_digest_follows_content() -> None:
    assert parse_schema(BASE).digest != parse_schema(changed("features.0.max_length", 6)).digest


def test_a_schema_of_an_earlier_release_has_the_digest_it_had() -> None:
    """What was built and trained with it goes on: keys that came later change no digest where they are not used."""
    assert parse_schema(BASE).digest == "cfe94302c41ba3ad"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("labels.0.name", "feed/click", "labels.0.name"),
        ("features.1.columns", "clicked", r"feature 'age' reads column 'clicked', which is label 'click'"),
        ("labels.0.oracle", "age", r"feature 'age' reads column 'age', which is the oracle of label 'click'"),
        ("keys.requst", ["r"], r"keys\.requst: unknown key"),
        ("features.2.table", "nowhere", "feature 'item' reads table 'nowhere'"),
        ("features.0.level", "impression", "feature 'history': a sequence is request-level"),
        ("features.0.max_length", None, "feature 'history': a sequence needs 'max_length'"),
        ("features.1.name", "item", "given twice: item"),
        ("features.1.columns", "item", "request-level and impression-level at once: item"),
        ("features.2.fill_id", 10, "fill_id 10 is outside table 'item' of 10 rows"),
        ("features.2.kind", "dense", "feature 'item': 'table' is for kind: ids"),
        ("features.1.name", "a.b", r"features\.1\.name"),
        ("tables.item.rows", 0, r"tables\.item\.rows"),
        ("labels", [], "labels"),
    ],
)
def test_contradictions_are_named(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_schema(changed(path, value))


def test_not_yaml_and_not_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"s\.yaml: not valid YAML"):
        parse_schema("a: [", "s.yaml")
    with pytest.raises(ConfigError, match="expected a mapping"):
        parse_schema("- a")


def test_schema_is_immutable() -> None:
    schema: Schema = parse_schema(BASE)
    with pytest.raises(ValueError, match="frozen"):
        schema.name = "other"  # type: ignore[misc]

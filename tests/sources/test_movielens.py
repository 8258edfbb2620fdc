"""MovieLens: small files in its publisher's formats; requests and histories of ratings."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.config import load_config
from roo_ray.errors import ConfigError, DataError
from roo_ray.models.check import check_model
from roo_ray.schema import Schema, parse_schema
from roo_ray.source_config import MovielensSource
from roo_ray.sources import open_source
from roo_ray.sources.movielens import Movielens
from tests.sources.joined import assemble

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "configs" / "movielens.yaml")
SCHEMA = CONFIG.request_schema
RATINGS = [(1, 1193, 5, 978300760), (1, 661, 3, 978302109), (1, 914, 3, 978301968), (2, 1357, 5, 978298709)]
RATINGS += [(1, 3408, 4, 978301968), (2, 3068, 4, 978299000)]


def write(folder: Path, rows: list[tuple[int, int, float, int]], csv: bool) -> Path:
    """``ratings.csv`` as of 20M, or ``ratings.dat`` as of 1M."""
    folder.mkdir(exist_ok=True, parents=True)
    if csv:
        lines = ["userId,movieId,rating,timestamp", *(f"{u},{m},{float(r)},{t}" for u, m, r, t in rows)]
    else:
        lines = [f"{u}::{m}::{r}::{t}" for u, m, r, t in rows]
    (folder / ("ratings.csv" if csv else "ratings.dat")).write_text("\n".join(lines) + "\n")
    return folder


def opened(folder: Path, schema: Schema = SCHEMA, **changes: Any) -> Movielens:
    config = MovielensSource.model_validate({"kind": "movielens", "path": str(folder)} | changes)
    source = open_source(config, schema)
    assert isinstance(source, Movielens)
    return source


def moment(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).replace(tzinfo=None)


@pytest.mark.parametrize("csv", [True, False], ids=["csv", "dat"])
def test_the_publishers_files(tmp_path: Path, csv: bool) -> None:
    result = assemble(opened(write(tmp_path, RATINGS, csv)))
    assert result.rows.column_names == SCHEMA.columns
    rows = result.rows.to_pylist()
    assert [(row["user_id"], row["request_time"], row["movie_id"]) for row in rows] == [
        (1, moment(978300760), [1193]),
        (1, moment(978301968), [914, 3408]),
        (1, moment(978302109), [661]),
        (2, moment(978298709), [1357]),
        (2, moment(978299000), [3068]),
    ]
    assert [row["history_movie_id"] for row in rows] == [[], [1193], [1193, 914, 3408], [], [1357]]
    assert rows[2]["history_rating"] == [5.0, 3.0, 4.0]
    assert rows[2]["history_time"] == [moment(978300760), moment(978301968), moment(978301968)]
    assert [row["liked"] for row in rows] == [[1], [0, 1], [0], [1], [1]]
    assert rows[1]["rated"] == [1, 1]
    assert result.counts == {"repeated_ratings": 0}


def test_gaps_and_history_length(tmp_path: Path) -> None:
    result = assemble(opened(write(tmp_path, RATINGS, False), gap_seconds=2000, history_length=1, like_from=5))
    rows = result.rows.to_pylist()
    assert [row["movie_id"] for row in rows] == [[1193, 914, 3408, 661], [1357, 3068]]
    assert [row["history_movie_id"] for row in rows] == [[], []]
    assert rows[0]["liked"] == [1, 0, 0, 0]


ratings = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 30), st.sampled_from([0.5, 3.0, 4.0, 5.0]), st.integers(0, 40)),
    min_size=1,
    max_size=40,
    unique_by=lambda row: row[:2],
)


@settings(max_examples=20, deadline=None)
@given(ratings, st.integers(0, 5))
def test_every_rating_once_with_what_came_before(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, float, int]], length: int
) -> None:
    source = opened(write(tmp_path_factory.mktemp("ml"), rows, True), history_length=length)
    found = assemble(source, buckets=3, seed=1).rows.to_pylist()
    assert sorted((row["user_id"], movie) for row in found for movie in row["movie_id"]) == sorted(
        row[:2] for row in rows
    )
    for row in found:
        before = [r for r in rows if r[0] == row["user_id"] and moment(r[3]) < row["request_time"]]
        before = sorted(before, key=lambda r: (r[3], r[1]))
        assert row["history_movie_id"] == [r[1] for r in before[len(before) - min(length, len(before)) :]]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, RATINGS, False)
    (folder / "ratings.dat").write_text("1::2::3::4\n1:x:2::3::4\n")
    with pytest.raises(DataError, match="line 2: fields must be separated by two colons"):
        assemble(opened(folder))
    (folder / "ratings.dat").write_text("1::2::3::4\n1::2::good::4\n")
    with pytest.raises(DataError, match="line 2, column 'rating': 'good' is no number"):
        assemble(opened(folder))
    write(tmp_path, RATINGS, True)
    with pytest.raises(DataError, match=r"has 2 of ratings\.csv and ratings\.dat"):
        opened(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no file ratings\.\*"):
        opened(tmp_path / "empty")
    text = (ROOT / "configs" / "schemas" / "movielens.yaml").read_text()
    with pytest.raises(ConfigError, match="impression-level column 'genre' is not in MovieLens"):
        opened(folder, parse_schema(text.replace("column: liked", "column: genre")))


def test_the_config_trains_both_stages() -> None:
    check_model(SCHEMA, CONFIG.model, "cpu")
    check_model(SCHEMA, CONFIG.model.model_copy(update={"kind": "hstu_targets"}), "cpu")

"""Reads the files of ``jobs/size_cluster.py``: YAML or JSON, at a path or URI, unknown keys refused."""

from __future__ import annotations

from typing import TypeVar

import yaml
from pydantic import ValidationError

from roo_ray.cluster.sizing import Prices, UnitCosts
from roo_ray.errors import ConfigError
from roo_ray.schema import Strict, readable_errors
from roo_ray.storage import read_text

Kind = TypeVar("Kind", bound=Strict)


def _read(path: str, kind: type[Kind], what: str) -> Kind:
    try:
        return kind.model_validate(yaml.safe_load(read_text(path, what)))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}:\n  {readable_errors(error)}") from None


def read_costs(path: str) -> UnitCosts:
    """Measured unit costs. Raises ConfigError, one line per wrong key."""
    return _read(path, UnitCosts, "costs")


def read_prices(path: str) -> Prices:
    """Prices by the hour. Raises ConfigError, one line per wrong key."""
    return _read(path, Prices, "prices")

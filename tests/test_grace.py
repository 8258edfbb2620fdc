"""The head's grace period for stopped jobs."""

from __future__ import annotations

import math

import pytest

from roo_ray.grace import GRACE_VARIABLE, RAY_DEFAULT_GRACE_S, grace_seconds, stop_limit_s


@pytest.mark.parametrize(
    ("value", "seconds", "limit"),
    [
        (None, RAY_DEFAULT_GRACE_S, math.inf),
        ("300", 300, 270),
        ("40", 40, 30),
        ("soon", math.nan, math.inf),
        ("300.0", math.nan, math.inf),  # Ray raises on it when a job is stopped
    ],
)
def test_grace(value: str | None, seconds: float, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GRACE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(GRACE_VARIABLE, value)
    assert grace_seconds() == pytest.approx(seconds, nan_ok=True)
    assert stop_limit_s() == limit

"""The head's grace period for stopped jobs."""

from __future__ import annotations

import pytest

from roo_ray.cluster.grace import GRACE_VARIABLE, RAY_DEFAULT_GRACE_S, grace_seconds


@pytest.mark.parametrize(
    ("value", "seconds"), [(None, RAY_DEFAULT_GRACE_S), ("120", 120), ("soon", RAY_DEFAULT_GRACE_S)]
)
def test_grace(value: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GRACE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(GRACE_VARIABLE, value)
    assert grace_seconds() == seconds

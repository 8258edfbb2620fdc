"""``roo_ray.sources.times``: sources need it too, and imports run downwards only."""

from roo_ray.sources.times import (
    SECONDS_A_DAY,
    Seconds,
    day_name,
    epoch_seconds,
    is_time_type,
    utc_days,
)

__all__ = [
    "SECONDS_A_DAY",
    "Seconds",
    "day_name",
    "epoch_seconds",
    "is_time_type",
    "utc_days",
]

"""What preflight finds: one line each, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "skip", "fail"]


@dataclass(frozen=True)
class Finding:
    """``check``: what was looked at. ``what``: what it is. ``do``: what to do about it, where it is not ok."""

    level: Level
    check: str
    what: str
    do: str = ""

    def line(self) -> str:
        """One line of a report."""
        return f"{self.level:<5} {self.check:<16} {self.what}" + (f"  ->  {self.do}" if self.do else "")


def ok(check: str, what: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", check, what)


def warn(check: str, what: str, do: str) -> Finding:
    """The run may go, slower or at a risk."""
    return Finding("warn", check, what, do)


def skip(check: str, what: str, do: str) -> Finding:
    """Not checked: what it is about is not there yet."""
    return Finding("skip", check, f"not checked: {what}", do)


def fail(check: str, what: str, do: str) -> Finding:
    """The run would fail."""
    return Finding("fail", check, what, do)


def worst(findings: Sequence[Finding]) -> Level:
    """The most serious level among them."""
    order: tuple[Level, ...] = ("ok", "warn", "skip", "fail")
    return max((finding.level for finding in findings), key=order.index, default="ok")

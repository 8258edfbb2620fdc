"""The validation report: for every check of a build what was looked at, what was found, and what followed.

A build's tasks return findings, which add up; a build with a failed one publishes nothing and raises
``CheckFailed``, which carries the whole report. Otherwise the report goes into the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from roo_ray.errors import DataError

Status = Literal["passed", "counted", "repaired", "failed"]
FAIL, COUNT, FILL = "fail", "count", "fill"


@dataclass(frozen=True)
class Finding:
    """One check of one subject (a column, mostly): ``found`` of ``looked_at`` things (``of``) break it.

    ``rule``: ``fail``, ``count``, or how it is repaired (``drop``, ``fill``, ``first``, ``last``, ``max_time``).
    With a ``limit`` only a share above it fails. ``first``: the first offender and where it is. ``problem``:
    the error for the user, with ``{found}`` and ``{looked_at}`` in the place of the numbers. ``counts_as``:
    names under which ``found`` is counted in the manifest.
    """

    check: str
    subject: str
    looked_at: int
    of: str
    found: int
    rule: str
    first: str = ""
    problem: str = ""
    limit: float | None = None
    counts_as: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """``passed`` where nothing was found; else what followed from the rule."""
        if self.found == 0:
            return "passed"
        if self.limit is not None:
            return "failed" if self.found > self.limit * self.looked_at else "counted"
        if self.rule == FAIL:
            return "failed"
        return "counted" if self.rule in (COUNT, FILL) else "repaired"

    @property
    def message(self) -> str:
        """The error for the user, in one line."""
        text = self.problem.replace("{found}", str(self.found), 1)
        return text.replace("{looked_at}", str(self.looked_at), 1)


class CheckFailed(DataError):
    """A check of a build failed: the message of the first failed one, and the whole report as ``findings``."""

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = list(findings)

    def __reduce__(self) -> tuple[type[CheckFailed], tuple[str, list[Finding]]]:
        return type(self), (str(self), self.findings)


def merge_findings(parts: Iterable[Sequence[Finding]]) -> list[Finding]:
    """The findings of several tables as those of all: numbers add up, the first offender of the first table that
    has one stands. In the order of first appearance."""
    merged: dict[tuple[str, str], Finding] = {}
    for part in parts:
        for finding in part:
            key = (finding.check, finding.subject)
            if (before := merged.get(key)) is None:
                merged[key] = finding
                continue
            named = before if before.found else finding
            merged[key] = replace(
                named, looked_at=before.looked_at + finding.looked_at, found=before.found + finding.found
            )
    return list(merged.values())


def accounted(kind: str, rows: int, counts: Mapping[str, int]) -> Finding:
    """The finding that no row was lost or doubled between source and shards, which a build has made sure of."""
    dropped = counts.get("dropped_impressions", 0)
    first = f"{counts['impressions']:,} impressions written" + (f", {dropped:,} dropped by rule" if dropped else "")
    return Finding("rows lost or doubled", "all", rows, kind, 0, FAIL, first)


def stops_writing(findings: Iterable[Finding]) -> bool:
    """Whether these findings alone, of a part of the data, forbid to publish: limits hold for the whole only."""
    return any(finding.status == "failed" and finding.limit is None for finding in findings)


def require_passed(findings: Sequence[Finding]) -> None:
    """Raises CheckFailed where a check failed."""
    failed = [finding for finding in findings if finding.status == "failed"]
    if failed:
        more = ", ".join(f"{finding.check} ({finding.subject})" for finding in failed[1:])
        others = f" [also failed: {more}]" if more else ""
        raise CheckFailed(failed[0].message + others, findings)


def counts_of(findings: Iterable[Finding]) -> dict[str, int]:
    """What was found, by the names of the manifest's counts."""
    counts: dict[str, int] = {}
    for finding in findings:
        for name in finding.counts_as:
            counts[name] = counts.get(name, 0) + finding.found
    return counts


def report_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The report as plain JSON: ``status`` (``passed``, ``passed with remarks``, ``failed``) and ``checks``."""
    states = {finding.status for finding in findings}
    status = "failed" if "failed" in states else "passed with remarks" if states - {"passed"} else "passed"
    checks = [
        {
            "check": finding.check,
            "subject": finding.subject,
            "looked_at": finding.looked_at,
            "of": finding.of,
            "found": finding.found,
            "rule": _rule(finding),
            "status": finding.status,
            "first": finding.first,
            "message": finding.message if finding.status == "failed" else "",
        }
        for finding in findings
    ]
    return {"status": status, "checks": checks}


def _rule(finding: Finding) -> str:
    return finding.rule if finding.limit is None else f"fail above {finding.limit:.4g} of all"


def report_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """(header, rows, note) of text: a row for each check that found something or was broken; checks that passed
    are summed up, one row a check. Of a version whose users were forgotten (``forget.carried_report``) its own
    numbers come first, and the checks are said to be of the version before."""
    header = ["check", "of", "looked at", "found", "rule", "status", "first"]
    rows = [_removed(report, of) for of in ("requests", "impressions") if "of_version" in report]
    passed: dict[str, list[Mapping[str, Any]]] = {}
    for check in report.get("checks", []):
        if check["status"] == "passed":
            passed.setdefault(check["check"], []).append(check)
    for check in report.get("checks", []):
        if check["status"] != "passed":
            rows.append(_row(check, check["subject"]))
        elif check["check"] in passed:
            same = passed.pop(check["check"])
            subject = check["subject"] if len(same) == 1 else f"{len(same)} columns"
            rows.append(_row(check | {"looked_at": sum(item["looked_at"] for item in same)}, subject))
    whose = f" of version {report['of_version']}, before users were forgotten" if "of_version" in report else ""
    note = f"{len(report.get('checks', []))} checks{whose}: {report.get('status', 'no report')}"
    return header, rows, note


def _removed(report: Mapping[str, Any], of: str) -> list[str]:
    """The row of what a version has lost to forgetting; its ``looked at`` is what both have."""
    gone, left = report.get(f"{of}_removed", 0), report.get(of, 0)
    users = f"{left:,} {of} are left; of {report.get('users_removed', 0):,} users"
    return ["forgotten users (all)", of, f"{gone + left:,}", f"{gone:,}", "forget", "removed", users]


def _row(check: Mapping[str, Any], subject: str) -> list[str]:
    return [
        f"{check['check']} ({subject})",
        check["of"],
        f"{check['looked_at']:,}",
        f"{check['found']:,}",
        check["rule"],
        (check["status"].upper() if check["status"] == "failed" else check["status"])
        + (" before" if check.get("carried_over") else ""),
        check["first"],
    ]

"""What an examination of request rows notes down: findings about requests, about values, about list lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_ray.requests.grouping import describe_key, short
from roo_ray.requests.report import FAIL, Finding
from roo_ray.schema import Schema
from roo_ray.sources.columns import as_array, is_list, list_parts
from roo_ray.sources.compare import Mask


@dataclass(frozen=True)
class Leaves:
    """The innermost values of a column, and the list lengths on the way to them, outermost first."""

    values: pa.Array
    levels: list[npt.NDArray[np.int64]]

    @staticmethod
    def of(array: pa.Array) -> Leaves:
        levels = []
        while is_list(array.type):
            lengths, array = list_parts(array)
            levels.append(lengths)
        return Leaves(array, levels)

    def row(self, position: int) -> int:
        """The row that a value belongs to."""
        for lengths in reversed(self.levels):
            position = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
        return position


class BrokenRows(Exception):
    """The rows are too broken for the checks that would follow."""


class Notes:
    """The findings of some request rows, by check and subject."""

    def __init__(self, requests: pa.Table, schema: Schema) -> None:
        self.requests = requests
        self.schema = schema
        self.findings: dict[tuple[str, str], Finding] = {}

    def array(self, name: str) -> pa.Array:
        return as_array(self.requests.column(name))

    def where(self, row: int) -> str:
        return f"request {describe_key(self.requests, row, self.schema.keys.request)}"

    def add(self, finding: Finding, needed: bool = False) -> bool:
        """Keeps a finding; whether the check passed. Raises BrokenRows where it must pass for others to make sense."""
        self.findings.setdefault((finding.check, finding.subject), finding)
        if needed and finding.found:
            raise BrokenRows
        return finding.found == 0

    def rows(
        self,
        check: str,
        subject: str,
        wrong: Mask,
        of: str,
        rule: str,
        problem: str = "",
        example: str = "",
        needed: bool = False,
        limit: float | None = None,
        counts_as: Sequence[str] = (),
    ) -> bool:
        """A check of requests: ``wrong`` (requests,); ``{first}`` in ``problem`` is the first such request."""
        found = int(wrong.sum())
        first = self.where(int(np.flatnonzero(wrong)[0])) if found else ""
        problem = problem.replace("{first}", first) if found else ""
        finding = Finding(
            check, subject, len(wrong), of, found, rule, example or first, problem, limit, tuple(counts_as)
        )
        return self.add(finding, needed)

    def values(
        self,
        check: str,
        name: str,
        leaves: Leaves,
        wrong: Mask,
        rule: str,
        what: str,
        advice: str,
        subject: str = "",
        needed: bool = False,
        counts_as: Sequence[str] = (),
    ) -> bool:
        """A check of the values of a column: ``wrong`` (values,)."""
        found = int(wrong.sum())
        first = problem = ""
        if found:
            at = int(np.flatnonzero(wrong)[0])
            first = f"{short(leaves.values[at].as_py())} in {self.where(leaves.row(at))}"
            problem = f"column '{name}': {{found}} values {what} (first: {first}); {advice}"
        finding = Finding(
            check, subject or name, len(wrong), "values", found, rule, first, problem, counts_as=tuple(counts_as)
        )
        return self.add(finding, needed)

    def aligned(self, names: Sequence[str], subject: str, what: str) -> npt.NDArray[np.int64] | None:
        """The list lengths that all columns share; None where they differ."""
        first = list_parts(self.array(names[0]))[0]
        wrong = np.zeros(len(first), np.bool_)
        example = ""
        for name in names[1:]:
            other = list_parts(self.array(name))[0]
            unequal = first != other
            if unequal.any() and not example:
                row = int(np.flatnonzero(unequal)[0])
                example = f"'{names[0]}' has {first[row]} and '{name}' {other[row]} in {self.where(row)}"
            wrong |= unequal
        problem = (
            f"{what} have unequal lengths in {{found}} requests (first: {example}); they must have one value each per "
            "element: correct the source"
        )
        equal = self.rows("unequal list lengths", subject, wrong, "requests", FAIL, problem, example)
        return first if equal else None

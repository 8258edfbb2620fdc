"""Text tables (CSV, TSV) in bounded memory: units of whole lines, read in blocks, every value typed.

Opening a file reads it once to count its lines: so a build knows how many rows it must find again, and an error
names its line. A row is a line: line breaks within quotes are refused.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs

from roo_ray.errors import DataError
from roo_ray.sources.base import ReadUnit, RowKind
from roo_ray.sources.columns import as_array
from roo_ray.storage import join_path, open_filesystem

UNIT_BYTES = 128_000_000
BLOCK_BYTES = 16_000_000
HEADER_BYTES = 1_000_000


@dataclass(frozen=True)
class TextUnit(ReadUnit):
    """Whole lines of a text file: its bytes ``begin`` to ``end``. ``line``: the number of the first, from 1."""

    begin: int = 0
    end: int = 0
    line: int = 1


@dataclass(frozen=True)
class TextFile:
    """A text table. ``columns``: the fields of a line, in order. ``quotes``: whether double quotes are special.
    ``begin``, ``line``: where the rows begin (after the header)."""

    root: str
    path: str
    columns: tuple[str, ...]
    delimiter: str
    quotes: bool
    begin: int = 0
    line: int = 1


def find_files(folder: str, pattern: str, what: str) -> list[str]:
    """The names of the files in ``folder`` that match ``pattern``, sorted. Raises DataError where there is none."""
    filesystem, inner = open_filesystem(folder)
    if filesystem.get_file_info(inner).type != pafs.FileType.Directory:
        raise DataError(f"folder not found: {folder}; source.path must be the folder with {what}")
    listing = filesystem.get_file_info(pafs.FileSelector(inner))
    names = [item.base_name for item in listing if item.type == pafs.FileType.File]
    found = sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))
    if not found:
        there = ", ".join(sorted(names)[:8]) or "no files"
        raise DataError(f"{folder} has no file {pattern}; source.path must be the folder with {what} (it has: {there})")
    return found


def headless_file(folder: str, name: str, columns: Sequence[str], what: str) -> TextFile:
    """A tab-separated file without header, in which quotes are not special. Raises DataError where it is missing."""
    root = join_path(folder, find_files(folder, name, what)[0])
    return TextFile(root, open_filesystem(root)[1], tuple(columns), "\t", False)


def headed_file(folder: str, name: str) -> TextFile:
    """A comma-separated file whose first line names its columns. Raises DataError where that line is empty or names
    a column twice."""
    root = join_path(folder, name)
    filesystem, path = open_filesystem(root)
    with filesystem.open_input_file(path) as file:
        start = file.read(HEADER_BYTES)
    line, newline, _ = start.partition(b"\n")
    try:
        names = next(csv.reader([line.decode("utf-8-sig").rstrip("\r")]), [])
    except UnicodeDecodeError:
        raise DataError(f"{path}, line 1: the header is not UTF-8 text; write or copy the file again") from None
    if not names:
        raise DataError(f"{path}: the file is empty; its first line must name the columns")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line 1: the header names column '{twice[0]}' twice")
    return TextFile(root, path, tuple(names), ",", True, len(line) + len(newline), 2)


def require_columns(file: TextFile, columns: Sequence[str]) -> None:
    """Raises DataError naming the file and the first of ``columns`` that it lacks."""
    for column in columns:
        if column not in file.columns:
            close = difflib.get_close_matches(column, file.columns, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(file.columns)}"
            raise DataError(f"{file.path}: column '{column}' is missing; {hint}")


# ---- units ---------------------------------------------------------------------------------------


def text_units(file: TextFile, kind: RowKind, log: str, first: int = 0) -> list[TextUnit]:
    """Units of about ``UNIT_BYTES`` of a file, numbered from ``first``. Reads the file once; blank lines at its
    end are no rows."""
    filesystem, _ = open_filesystem(file.root)
    units: list[TextUnit] = []
    begin, line, lines = file.begin, file.line, 0

    def close(end: int) -> None:
        nonlocal begin, line, lines
        if lines:
            units.append(
                TextUnit(first + len(units), file.root, file.path, (), kind, lines, end - begin, log, begin, end, line)
            )
        begin, line, lines = end, line + lines, 0

    with filesystem.open_input_file(file.path) as stream:
        size = _size_without_blank_end(stream, file.begin)
        position, open_line = file.begin, False
        while position < size:
            block = stream.read_at(min(BLOCK_BYTES, size - position), position)
            if not block:
                raise DataError(f"{file.path} became shorter while it was read; run it again")
            last = block.rfind(b"\n")
            before, after = block[: last + 1], block[last + 1 :]
            if last >= 0:
                lines += before.count(b"\n")
                if position + last + 1 - begin >= UNIT_BYTES:
                    close(position + last + 1)
            open_line = bool(after) or (open_line and last < 0)
            position += len(block)
        lines += open_line
        close(size)
    return units


def _size_without_blank_end(stream: pa.NativeFile, begin: int) -> int:
    size: int = stream.size()
    while size > begin:
        start = max(begin, size - 4096)
        tail = stream.read_at(size - start, start)
        kept = tail.rstrip(b"\r\n")
        size = start + len(kept)
        if kept:
            break
    return max(size, begin)


# ---- reading -------------------------------------------------------------------------------------


def stream_text(
    unit: TextUnit, file: TextFile, types: pa.Schema, required: Sequence[str]
) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first line, rows) in tables of bounded size, with the columns and types of ``types``.

    An empty field is null. Raises DataError naming file, line and column for a line with another number of
    fields, a value that does not have its type, an empty field in a ``required`` column, and line breaks within
    quotes.
    """
    line, rows = unit.line, 0
    for block in _blocks(unit):
        table = _parse(block, file, types, line)
        for name in required:
            nulls = table.column(name)
            if nulls.null_count:
                at = line + int(np.flatnonzero(np.asarray(as_array(nulls).is_null()))[0])
                raise DataError(f"{file.path}, line {at}: column '{name}' is empty; correct or remove the line")
        yield line, table
        line += table.num_rows
        rows += table.num_rows
    if rows != unit.rows:
        raise DataError(
            f"{file.path}: lines {unit.line} to {unit.line + unit.rows - 1} hold {rows} rows; a row must be one line, "
            "without line breaks in quotes: correct the file"
        )


def _blocks(unit: TextUnit) -> Iterator[bytes]:
    filesystem, _ = open_filesystem(unit.root)
    with filesystem.open_input_file(unit.path) as stream:
        position, rest = unit.begin, b""
        while position < unit.end:
            data = stream.read_at(min(BLOCK_BYTES, unit.end - position), position)
            if not data:
                raise DataError(f"{unit.path} became shorter while it was read; run it again")
            position += len(data)
            block = rest + data
            cut = len(block) if position >= unit.end else block.rfind(b"\n") + 1
            block, rest = block[:cut], block[cut:]
            if block:
                yield block


def _read(block: bytes, file: TextFile, types: pa.Schema, line: int) -> pa.Table:
    broken: list[pacsv.InvalidRow] = []

    def note(row: pacsv.InvalidRow) -> str:
        broken.append(row)
        return "skip"

    table = pacsv.read_csv(
        pa.BufferReader(block),
        pacsv.ReadOptions(use_threads=False, column_names=list(file.columns), block_size=len(block) + 1),
        pacsv.ParseOptions(
            delimiter=file.delimiter,
            quote_char='"' if file.quotes else False,
            ignore_empty_lines=False,
            invalid_row_handler=note,
        ),
        pacsv.ConvertOptions(
            column_types=types,
            include_columns=types.names,
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    if broken:
        row = broken[0]
        raise DataError(
            f"{file.path}, line {line + row.number - 1}: {row.actual_columns} fields, but a line has "
            f"{row.expected_columns} ({', '.join(file.columns[:4])}, ...); correct or remove the line"
        )
    return table


def _parse(block: bytes, file: TextFile, types: pa.Schema, line: int) -> pa.Table:
    try:
        return _read(block, file, types, line)
    except pa.ArrowInvalid as error:
        raw = _read(block, file, pa.schema([(name, pa.binary()) for name in types.names]), line)
        for field in types:
            values = as_array(raw.column(field.name))
            bad = first_unfit(values, field.type)
            if bad is not None:
                value = values[bad].as_py()
                shown = value.decode("utf-8", "backslashreplace")[:60]
                raise DataError(
                    f"{file.path}, line {line + bad}, column '{field.name}': '{shown}' is no {_words(field.type)}; "
                    "correct or remove the line"
                ) from None
        raise DataError(f"{file.path}, lines from {line}: {error}; correct the file") from None


def _fits(values: pa.Array, kind: pa.DataType) -> bool:
    try:
        values.cast(pa.string()).cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def first_unfit(values: pa.Array, kind: pa.DataType) -> int | None:
    """The first of some text values (string or binary) that cannot be cast to ``kind``, by bisection."""
    if _fits(values, kind):
        return None
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(values.slice(low, middle - low), kind):
            low = middle
        else:
            high = middle
    return low


def _words(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "whole number"
    return "number" if pa.types.is_floating(kind) else "UTF-8 text"


class TextRows:
    """What sources of text have in common: no impression-level table on disk to hold the requests against."""

    @property
    def codec(self) -> str:
        """Text is not compressed."""
        return "text"

    def disk_bytes(self) -> None:
        """None: the rows are requests already, or requests are derived, and no file is the impression-level table."""
        return

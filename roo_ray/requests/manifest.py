"""The manifest: what a version of a request-shard data set consists of. No manifest, no data set.

Layout of a data set: ``_manifests/v000001.json``, ``v000002.json``, ... and immutable data files under
``data/``. A build writes its data files first; creating its manifest is the one act that publishes them, and
it fails if another writer has published that version in the meantime. Readers take the newest manifest. A version
may name files that earlier ones have written. A version that was purged keeps its name, as a tombstone.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from typing import Any, Literal

import pyarrow.fs as pafs
from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer
from pydantic.dataclasses import dataclass

from roo_ray.errors import DataError
from roo_ray.requests.claims import claimed
from roo_ray.schema import Schema, Strict, parse_schema, readable_errors
from roo_ray.storage import open_filesystem as open_filesystem  # also known under this module

MANIFESTS = "_manifests"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Unit:
    """A row group: the smallest thing that is read; a manifest has millions of them, hence no dictionary each.
    ``tokens``: history events of all its requests. ``first_row``: of a unit of an impression table
    (``ingest/clustered.py``), its first row in the file; its rows are its impressions; ``row_group``: the row group of
    the file that it shares with its neighbours, where there are several units in one. ``time_min``, ``time_max``: of
    its requests, seconds since the epoch (UTC); None in manifests that were written without them, which keep their
    text and digest."""

    requests: int
    impressions: int
    tokens: int
    first_row: int | None = None
    time_min: float | None = None
    time_max: float | None = None
    row_group: int | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_unknown(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        if self.time_min is None:
            del content["time_min"], content["time_max"]
        if self.row_group is None:
            del content["row_group"]
        return content


class ShardFile(Strict):
    """A Parquet file of request rows. ``path`` is relative to the data set; times are seconds since the epoch
    (UTC); ``day`` is the UTC day of all its requests, ``YYYY-MM-DD``; ``shard``: the user-hash shard of its day
    that it belongs to; ``digest``: sha256 (hex) of the file's bytes."""

    path: str
    day: str
    shard: int = 0
    requests: int
    impressions: int
    tokens: int
    bytes: int
    digest: str = ""
    time_min: float
    time_max: float
    units: list[Unit]


class AsideRows(Strict):
    """Rows that a build kept aside for one reason, such as events without their impression: how many, and the
    Parquet files that hold them (paths relative to the data set; none with ``build.keep_aside: false``)."""

    rows: int
    files: list[str] = Field(default_factory=list)


class Origin(Strict):
    """Where a version comes from.

    ``kind``: built from all of the source (``full``), from some ``days`` of it, the rest being its ``parent``'s
    (``days``), or the parent without some users (``forget``). ``created_at``: ISO 8601, UTC. ``source``: what it
    was built from. ``code``: the version of roo_ray. ``writer``: unique to the process that published it.
    ``purges``: the versions that hold users whom this one has forgotten: they are removed.
    """

    kind: Literal["full", "days", "forget"] = "full"
    parent: int | None = None
    created_at: str = ""
    source: str = ""
    code: str = ""
    writer: str = ""
    days: list[str] = Field(default_factory=list)
    purges: list[int] = Field(default_factory=list)


class DayAccount(Strict):
    """What the accounts of a version add up, for one UTC day, so that another version can carry it over.

    ``counts``: what the checks counted. ``sizes``: column -> kind -> level -> number, as the ledger measures them
    (kind ``kept``, of versions that count it: ``max_length`` -> ids).
    ``logged``: compressed bytes per column in the source's files, the day's share of them by impressions; None
    where the source is no impression log.
    """

    counts: dict[str, int] = Field(default_factory=dict)
    sizes: dict[str, dict[str, dict[str, int]]] = Field(default_factory=dict)
    logged: dict[str, int] | None = None


class Tombstone(Strict):
    """What stands in the place of a purged version's manifest. ``purged_at``: ISO 8601, UTC; ``why``; ``use``: the
    version to use instead; ``files``: data files of it that are yet to be deleted, if no other version has them."""

    format: int = FORMAT
    version: int
    purged_at: str
    why: str
    use: int
    files: list[str] = Field(default_factory=list)


class Manifest(Strict):
    """A version of a data set. ``origin``: where it comes from. ``aside``: rows that are in no request, by reason,
    and their files. ``counts``: of what its build read (``rows_read``, ``units_read``, ``impressions_read``,
    ``aside.*``, ...), and of all its requests, by name. ``ledger``: bytes and elements per column, impression-level
    against request-level (``requests/ledger.py``), and ids that ``max_length`` keeps (``requests/lengths.py``).
    ``report``: the validation report of its build (``requests/report.py``). ``accounts``: by UTC day, what counts and
    ledger are made of. ``exchange``: by UTC day, where its user shards begin (``requests/rebuild.py``)."""

    format: int = FORMAT
    version: int
    origin: Origin = Origin()
    schema_yaml: str
    schema_digest: str
    files: list[ShardFile]
    aside: dict[str, AsideRows] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    ledger: dict[str, Any] = Field(default_factory=dict)
    report: dict[str, Any] = Field(default_factory=dict)
    accounts: dict[str, DayAccount] = Field(default_factory=dict)
    exchange: dict[str, list[tuple[int, int]]] = Field(default_factory=dict)

    @property
    def requests(self) -> int:
        """Requests in all files."""
        return sum(file.requests for file in self.files)

    @property
    def impressions(self) -> int:
        """Impressions in all files."""
        return sum(file.impressions for file in self.files)

    @property
    def tokens(self) -> int:
        """History events in all files."""
        return sum(file.tokens for file in self.files)

    @property
    def days(self) -> list[str]:
        """The UTC days that have data, in order."""
        return sorted({file.day for file in self.files})

    def request_schema(self) -> Schema:
        """The schema that the data was built with."""
        return parse_schema(self.schema_yaml, "schema in manifest")

    def digest(self) -> str:
        """A short stable digest of the manifest's whole content."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def manifest_path(base: str, version: int) -> str:
    """Where the manifest of a version lies, below the data set's path in its file system."""
    return f"{base}/{MANIFESTS}/v{version:06d}.json"


def manifest_versions(data_set: str) -> list[int]:
    """The published versions of a data set, purged ones included, oldest first; empty where there is none."""
    filesystem, base = open_filesystem(data_set)
    listing = filesystem.get_file_info(pafs.FileSelector(f"{base}/{MANIFESTS}", allow_not_found=True))
    names = [os.path.basename(info.path) for info in listing if info.type == pafs.FileType.File]
    return sorted(int(n[1:-5]) for n in names if n.startswith("v") and n.endswith(".json") and n[1:-5].isdigit())


def publish_manifest(data_set: str, manifest: Manifest) -> None:
    """Publishes a version: its data files must be complete. Raises DataError if that version exists already
    (another writer was faster); nothing is overwritten.

    Locally the complete text is hard-linked into place, which is atomic and fails where the name exists. On an
    object store a put is atomic, and a claim (``requests/claims.py``) keeps two writers from putting one name.
    """
    filesystem, base = open_filesystem(data_set)
    path = manifest_path(base, manifest.version)
    content = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    taken = DataError(f"{data_set}: version {manifest.version} was published by another writer; run it again")
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    if isinstance(filesystem, pafs.LocalFileSystem):
        temporary = _write_beside(path, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise taken from None
        finally:
            os.unlink(temporary)
        return
    with claimed(data_set) as require_in_time:
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            raise taken
        require_in_time()
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        with filesystem.open_input_stream(path) as stream:
            if stream.read() != content:
                raise taken


def bury_manifest(data_set: str, tombstone: Tombstone) -> None:
    """Puts a tombstone in the place of a version's manifest (or of its earlier tombstone), atomically: a reader
    sees the one or the other."""
    filesystem, base = open_filesystem(data_set)
    path = manifest_path(base, tombstone.version)
    content = json.dumps(tombstone.model_dump(mode="json"), indent=1).encode()
    if isinstance(filesystem, pafs.LocalFileSystem):
        os.replace(_write_beside(path, content), path)
        return
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def _write_beside(path: str, content: bytes) -> str:
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def read_version(data_set: str, version: int) -> Manifest | Tombstone:
    """What is published under a version's number. Raises DataError where it is damaged or of another format."""
    filesystem, base = open_filesystem(data_set)
    path = manifest_path(base, version)
    with filesystem.open_input_stream(path) as stream:
        text = stream.read()
    try:
        kind = Tombstone if b'"purged_at"' in text[:200] else Manifest  # no dictionary of a whole manifest is made
        found: Manifest | Tombstone = kind.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{path} is not a valid manifest:\n  {readable_errors(error)}") from None
    if found.format != FORMAT:
        raise DataError(f"{path} has format {found.format}; this roo_ray reads format {FORMAT}")
    return found


def load_manifest(data_set: str, version: int | None = None) -> Manifest:
    """The newest manifest of a data set, or a given version. Raises DataError where there is none, and where that
    version was purged."""
    versions = manifest_versions(data_set)
    if not versions:
        raise DataError(
            f"{data_set} is not a request data set: it has no manifest. Build it with jobs/build_requests.py; "
            "a build that was interrupted leaves none and must be run again"
        )
    if version is None:
        version = versions[-1]
    elif version not in versions:
        raise DataError(f"{data_set} has no version {version}; published: {', '.join(map(str, versions))}")
    found = read_version(data_set, version)
    if isinstance(found, Tombstone):
        raise DataError(
            f"version {version} of {data_set} was purged on {found.purged_at[:10]} because {found.why}; what was "
            f"trained or pinned on it cannot go on: use version {versions[-1]}, under another run_name"
        )
    return found

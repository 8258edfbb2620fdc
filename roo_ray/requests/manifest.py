"""The manifest: what a version of a request-shard data set consists of. No manifest, no data set.

Layout of a data set: ``_manifests/v000001.json``, ``v000002.json``, ... and immutable data files under
``data/``. A build writes its data files first; creating its manifest is the one act that publishes them, and
it fails if another writer has published that version in the meantime. Readers take the newest manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import pyarrow.fs as pafs
from pydantic import Field, ValidationError

from roo_ray.errors import DataError
from roo_ray.schema import Schema, Strict, parse_schema, readable_errors
from roo_ray.storage import open_filesystem as open_filesystem  # also known under this module

MANIFESTS = "_manifests"
FORMAT = 1


class Unit(Strict):
    """A row group: the smallest thing that is read. ``tokens``: history events of all its requests.
    ``first_row``: of a unit of an impression table (``ingest/clustered.py``), its first row in the file; its
    rows are its impressions."""

    requests: int
    impressions: int
    tokens: int
    first_row: int | None = None


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


class Manifest(Strict):
    """A version of a data set. ``aside``: rows that are in no request, by reason, and their files. ``counts``:
    what was read, written and kept aside, by name. ``ledger``: bytes and elements per column, impression-level
    against request-level (``requests/ledger.py``). ``report``: the validation report of the build
    (``requests/report.py``)."""

    format: int = FORMAT
    version: int
    schema_yaml: str
    schema_digest: str
    files: list[ShardFile]
    aside: dict[str, AsideRows] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    ledger: dict[str, Any] = Field(default_factory=dict)
    report: dict[str, Any] = Field(default_factory=dict)

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


def manifest_versions(data_set: str) -> list[int]:
    """The published versions of a data set, oldest first; empty where there is none."""
    filesystem, base = open_filesystem(data_set)
    listing = filesystem.get_file_info(pafs.FileSelector(f"{base}/{MANIFESTS}", allow_not_found=True))
    names = [os.path.basename(info.path) for info in listing if info.type == pafs.FileType.File]
    return sorted(int(n[1:-5]) for n in names if n.startswith("v") and n.endswith(".json") and n[1:-5].isdigit())


def publish_manifest(data_set: str, manifest: Manifest) -> None:
    """Publishes a version: its data files must be complete. Raises DataError if that version exists already
    (another writer was faster); nothing is overwritten.

    Locally the complete text is hard-linked into place, which is atomic and fails where the name exists. On an
    object store a put is atomic.
    """
    filesystem, base = open_filesystem(data_set)
    path = f"{base}/{MANIFESTS}/v{manifest.version:06d}.json"
    content = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    taken = f"{data_set}: version {manifest.version} was published by another writer; run the build again"
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    if isinstance(filesystem, pafs.LocalFileSystem):
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise DataError(taken) from None
        finally:
            os.unlink(temporary)
        return
    if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
        raise DataError(taken)
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def load_manifest(data_set: str, version: int | None = None) -> Manifest:
    """The newest manifest of a data set, or a given version. Raises DataError where there is none."""
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
    filesystem, base = open_filesystem(data_set)
    path = f"{base}/{MANIFESTS}/v{version:06d}.json"
    with filesystem.open_input_stream(path) as stream:
        text = stream.read()
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{path} is not a valid manifest:\n  {readable_errors(error)}") from None
    if manifest.format != FORMAT:
        raise DataError(f"{path} has format {manifest.format}; this roo_ray reads format {FORMAT}")
    return manifest

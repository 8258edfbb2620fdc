"""Versions of a data set on disk: who may write the next one, where its files lie, purging old ones, clean-up."""

from __future__ import annotations

import datetime
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyarrow.fs as pafs

from roo_ray import __version__
from roo_ray.errors import DataError
from roo_ray.requests.alive import at_work, belongs_to, writers_at_work
from roo_ray.requests.assembly import ASIDE
from roo_ray.requests.manifest import (
    MANIFESTS,
    Manifest,
    Origin,
    Tombstone,
    bury_manifest,
    load_manifest,
    manifest_versions,
    read_version,
)
from roo_ray.requests.shards import DATA, version_folder
from roo_ray.storage import join_path, open_filesystem

STAGING = "_staging"
DATA_PARTS = (DATA, ASIDE)
FORGOTTEN = "users were forgotten"


@dataclass(frozen=True)
class NextVersion:
    """The number of the version to write. ``token``: part of the name of its folders, where files of another
    writer under the same number could come in between; else empty."""

    number: int
    token: str


def is_local(data_set: str) -> bool:
    """Whether a data set lies on a local (or mounted) file system, which has locks and renames."""
    return isinstance(open_filesystem(data_set)[0], pafs.LocalFileSystem)


def utc_now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def new_origin(origin: Origin) -> Origin:
    """The origin with what every writer adds: the time, the code's version, and the writer's token."""
    return origin.model_copy(update={"created_at": utc_now(), "code": __version__, "writer": uuid.uuid4().hex})


# ---- the writer ----------------------------------------------------------------------------------


@contextmanager
def only_writer(data_set: str, resume: bool = True) -> Iterator[NextVersion]:
    """The version to write next, as its only writer.

    Locally a lock on the data set's folder, which the system drops with the process, keeps a second writer out;
    what a killed one left is removed. On an object store, where there is no lock, each writer has a folder of its
    own, and the manifest's publication decides. A purge that was interrupted is finished first (``resume``).
    """
    filesystem, base = open_filesystem(data_set)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        if resume:
            finish_purge(data_set)
        token = uuid.uuid4().hex[:8]
        with at_work(data_set, token):
            yield NextVersion(max(manifest_versions(data_set), default=0) + 1, token)
        return
    os.makedirs(base, exist_ok=True)
    folder = os.open(base, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another build is writing {data_set}; wait for it or stop it") from None
        newest = max(manifest_versions(data_set), default=0)
        left = _remove_what_was_left(filesystem, base, data_set, newest)
        if resume:
            finish_purge(data_set)
        # tasks of a killed build may write for some seconds more: not into our folder
        yield NextVersion(newest + 1, uuid.uuid4().hex[:8] if left else "")
    finally:
        os.close(folder)


def _remove_what_was_left(filesystem: pafs.FileSystem, base: str, data_set: str, newest: int) -> bool:
    """Removes what killed writers left: staging, half-written manifests, and folders that no manifest names.
    Returns whether there was anything."""
    left = bool(filesystem.get_file_info(f"{base}/{STAGING}").type == pafs.FileType.Directory)
    remove_folder(filesystem, f"{base}/{STAGING}")
    for item in filesystem.get_file_info(pafs.FileSelector(f"{base}/{MANIFESTS}", allow_not_found=True)):
        if item.path.endswith(".tmp"):
            filesystem.delete_file(item.path)
    folders = version_folders(filesystem, base)
    doubtful = {version for version, names in folders.items() if version > newest or len(names) > 1}
    live = live_versions(data_set).values() if doubtful else []
    named = {path.split("/")[1] for manifest in live for path in named_files(manifest)}
    for version in doubtful:
        left |= version > newest
        for name in folders[version] - named:
            for part in DATA_PARTS:
                remove_folder(filesystem, f"{base}/{part}/{name}")
    return left


def version_folders(filesystem: pafs.FileSystem, base: str) -> dict[int, set[str]]:
    """Version -> the names of its folders, published or not: ``v000001``, ``v000001-1f3a...``."""
    folders: dict[int, set[str]] = {}
    for part in DATA_PARTS:
        for item in filesystem.get_file_info(pafs.FileSelector(f"{base}/{part}", allow_not_found=True)):
            name = os.path.basename(item.path)
            number = name.partition("-")[0][1:]
            if item.type == pafs.FileType.Directory and name[:1] == "v" and number.isdigit():
                folders.setdefault(int(number), set()).add(name)
    return folders


# ---- purging -------------------------------------------------------------------------------------


def named_files(manifest: Manifest) -> list[str]:
    """All files of a version, relative to the data set: data files and rows kept aside."""
    return [file.path for file in manifest.files] + [path for rows in manifest.aside.values() for path in rows.files]


def live_versions(data_set: str) -> dict[int, Manifest]:
    """The versions that can be read, oldest first."""
    found = {version: read_version(data_set, version) for version in manifest_versions(data_set)}
    return {version: item for version, item in found.items() if isinstance(item, Manifest)}


def finish_purge(data_set: str) -> list[str]:
    """Removes the versions that the newest one purges (``origin.purges``): first each manifest gives way to a
    tombstone, so that no reader takes it up, then the files that no other version has are deleted. May be
    interrupted and called again. Returns the deleted files.
    """
    versions = manifest_versions(data_set)
    if not versions:
        return []
    purges = load_manifest(data_set).origin.purges
    tombstones = []
    for version in purges:
        found = read_version(data_set, version)
        if isinstance(found, Manifest):
            found = Tombstone(
                version=version, purged_at=utc_now(), why=FORGOTTEN, use=versions[-1], files=named_files(found)
            )
            bury_manifest(data_set, found)
        if found.files:
            tombstones.append(found)
    if not tombstones:
        return []
    filesystem, base = open_filesystem(data_set)
    kept = {path for manifest in live_versions(data_set).values() for path in named_files(manifest)}
    deleted = sorted({path for tombstone in tombstones for path in tombstone.files} - kept)
    for path in deleted:
        if filesystem.get_file_info(f"{base}/{path}").type != pafs.FileType.NotFound:
            filesystem.delete_file(f"{base}/{path}")
    if isinstance(filesystem, pafs.LocalFileSystem):
        for part in DATA_PARTS:
            _remove_empty_folders(f"{base}/{part}")
    for tombstone in tombstones:
        bury_manifest(data_set, tombstone.model_copy(update={"files": []}))
    return deleted


def staging_folder(data_set: str, version: NextVersion) -> str:
    """The folder, of its own, of a writer's files between the stages."""
    return join_path(data_set, STAGING, f"{uuid.uuid4().hex[:12]}{version.token}")


# ---- clean-up ------------------------------------------------------------------------------------


def discard(data_set: str, version: NextVersion) -> None:
    """Removes the files of a version that was not published."""
    filesystem, base = open_filesystem(data_set)
    name = os.path.basename(version_folder(version.number, version.token))
    for part in DATA_PARTS:
        remove_folder(filesystem, f"{base}/{part}/{name}")
        remove_if_empty(filesystem, f"{base}/{part}")


def remove_orphans(data_set: str, seconds: float) -> int:
    """Removes the files that killed writers left on an object store, where no lock tells a killed writer from one at
    work: files between stages, data and rows kept aside that no version names, last written more than ``seconds``
    ago, and of no writer that is at work (``alive``). Returns how many."""
    filesystem, base = open_filesystem(data_set)
    alive = writers_at_work(data_set)  # before the listing: what a writer begins later is too young
    old: list[str] = []
    before = datetime.datetime.now(datetime.timezone.utc).timestamp() - seconds
    for part in (STAGING, *DATA_PARTS):
        found = filesystem.get_file_info(pafs.FileSelector(f"{base}/{part}", recursive=True, allow_not_found=True))
        files = [item for item in found if item.type == pafs.FileType.File and item.mtime_ns is not None]
        old += [item.path for item in files if item.mtime_ns < before * 1e9]
    if not old:
        return 0
    # read after the listing: what was published in between is named here
    versions = [read_version(data_set, version) for version in manifest_versions(data_set)]
    named = {path for item in versions for path in (named_files(item) if isinstance(item, Manifest) else item.files)}
    orphans = [path for path in old if (own := path[len(base) + 1 :]) not in named and not belongs_to(own, alive)]
    for path in orphans:
        filesystem.delete_file(path)
    return len(orphans)


def remove_folder(filesystem: pafs.FileSystem, folder: str) -> None:
    """Removes a folder, if it is there."""
    if filesystem.get_file_info(folder).type == pafs.FileType.Directory:
        filesystem.delete_dir(folder)


def remove_if_empty(filesystem: pafs.FileSystem, folder: str) -> None:
    """Removes a folder, if it is there and empty."""
    info = filesystem.get_file_info(folder)
    if info.type == pafs.FileType.Directory and not filesystem.get_file_info(pafs.FileSelector(folder)):
        filesystem.delete_dir(folder)


def _remove_empty_folders(folder: str) -> None:
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(path)


def remove_strays(data_set: str, version: NextVersion, manifest: Manifest) -> None:
    """Removes what is in the folders of a version and not named by its manifest: what a task that was killed and
    run again has left half-written, and files that turned out equal to those of an earlier version."""
    filesystem, base = open_filesystem(data_set)
    named = {f"{base}/{path}" for path in named_files(manifest)}
    name = os.path.basename(version_folder(version.number, version.token))
    for part in DATA_PARTS:
        folder = f"{base}/{part}/{name}"
        for item in filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True)):
            if item.type == pafs.FileType.File and item.path not in named:
                filesystem.delete_file(item.path)
        if isinstance(filesystem, pafs.LocalFileSystem):
            _remove_empty_folders(folder)
            remove_if_empty(filesystem, f"{base}/{part}")

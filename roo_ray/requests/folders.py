"""The folders of a data set while a version is written: the only writer's lock, and what must not stay behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs

from roo_ray.errors import DataError
from roo_ray.requests.manifest import Manifest, load_manifest, manifest_versions
from roo_ray.requests.shards import DATA, version_folder
from roo_ray.requests.stages import ASIDE, aside_folder
from roo_ray.storage import open_filesystem

STAGING = "_staging"


def is_local(data_set: str) -> bool:
    """Whether the data set lies on a local (or mounted) file system, where locks and renames work."""
    return isinstance(open_filesystem(data_set)[0], pafs.LocalFileSystem)


def _data_versions(filesystem: pafs.FileSystem, base: str) -> set[int]:
    folders = [f"{base}/{DATA}", f"{base}/{ASIDE}"]
    listing = [item for f in folders for item in filesystem.get_file_info(pafs.FileSelector(f, allow_not_found=True))]
    names = [os.path.basename(item.path) for item in listing if item.type == pafs.FileType.Directory]
    return {int(name[1:]) for name in names if name[:1] == "v" and name[1:].isdigit()}


@contextmanager
def only_writer(data_set: str) -> Iterator[int]:
    """The number of the version to build, as its only writer.

    Locally a lock on the data set's folder, which the system drops with the process, keeps a second build out;
    what a killed build left is removed. On an object store, where there is no lock, each build
    writes to a folder of its own, and the manifest's publication decides.
    """
    filesystem, base = open_filesystem(data_set)
    newest = max(manifest_versions(data_set), default=0)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield newest + 1
        return
    os.makedirs(base, exist_ok=True)
    folder = os.open(base, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another build is writing {data_set}; wait for it or stop it") from None
        newest = max(manifest_versions(data_set), default=0)
        remove_folder(filesystem, f"{base}/{STAGING}")
        for version in _data_versions(filesystem, base):
            if version > newest:
                remove_folder(filesystem, f"{base}/{version_folder(version)}")
                remove_folder(filesystem, f"{base}/{aside_folder(version)}")
        yield newest + 1
    finally:
        os.close(folder)


def remove_folder(filesystem: pafs.FileSystem, folder: str) -> None:
    """Removes a folder with all that is in it, where it is there."""
    if filesystem.get_file_info(folder).type == pafs.FileType.Directory:
        filesystem.delete_dir(folder)


def remove_if_empty(filesystem: pafs.FileSystem, folder: str) -> None:
    """Removes a folder that holds nothing."""
    info = filesystem.get_file_info(folder)
    if info.type == pafs.FileType.Directory and not filesystem.get_file_info(pafs.FileSelector(folder)):
        filesystem.delete_dir(folder)


def remove_strays(data_set: str, folders: list[str], manifest: Manifest) -> None:
    """Removes files in ``folders`` that the manifest does not name: what a task that was killed and run again
    has left half-written."""
    filesystem, base = open_filesystem(data_set)
    named = {file.path for file in manifest.files} | {name for rows in manifest.aside.values() for name in rows.files}
    for folder in folders:
        selector = pafs.FileSelector(f"{base}/{folder}", recursive=True, allow_not_found=True)
        for item in filesystem.get_file_info(selector):
            if item.type == pafs.FileType.File and item.path[len(base) :].lstrip("/") not in named:
                filesystem.delete_file(item.path)


def require_published(data_set: str, manifest: Manifest) -> None:
    """Reads a manifest back where publishing has no atomic "only if absent" (object stores through pyarrow).

    Raises DataError where another build's manifest stands under its name: that build has won, this one publishes
    nothing. What remains: a build that looked before this one's put and puts after this check replaces it; both
    sets of data files are whole then, and readers see the later one. One writer a data set avoids it.
    """
    if not is_local(data_set) and load_manifest(data_set, manifest.version) != manifest:
        raise DataError(
            f"{data_set}: version {manifest.version} was published by another writer at the same time; run the "
            "build again"
        )

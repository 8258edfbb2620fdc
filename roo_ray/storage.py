"""Where files lie: local paths and URIs through pyarrow's file systems."""

from __future__ import annotations

import os
import re

import pyarrow as pa
import pyarrow.fs as pafs

from roo_ray.errors import ConfigError, DataError
from roo_ray.redact import redact_text


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """(file system, path in it) of a local path or URI. Raises DataError for an unknown scheme."""
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(path)
    try:
        filesystem, inner = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = redact_text(f"cannot open {path}: {error}")
        raise DataError(f"{reason}; use a local path, s3://..., or gs://...") from None
    return filesystem, inner


def is_local(path: str) -> bool:
    """Whether a path or URI is in this machine's own file system, or in one that is mounted there."""
    return "://" not in path or path.startswith("file://")


def without_secrets(path: str) -> str:
    """A path or URI without the keys that may stand in it, to be kept and shown."""
    return re.sub(r"(?<=://)[^/@]*@", "", path.partition("?")[0])


def read_text(path: str, what: str) -> str:
    """The text of a file at a local path or URI. Raises ConfigError, naming ``what`` it is, where it is missing or
    not UTF-8."""
    shown = without_secrets(path) if "://" in path else path
    filesystem, inner = open_filesystem(path)
    try:
        if not filesystem.get_file_info(inner).is_file:
            raise ConfigError(f"{what} file not found: {shown}")
        with filesystem.open_input_stream(inner) as stream:
            return bytes(stream.read()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not valid YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{what} file {shown} cannot be read: {error}") from None


def beside(path: str, name: str) -> str:
    """The path of ``name`` relative to the folder of the file at ``path``, a local path or URI; absolute paths and
    URIs are taken as they are."""
    if "://" in name or os.path.isabs(name):
        return name
    if "://" not in path:
        return os.path.join(os.path.dirname(path), name)
    base, mark, query = path.partition("?")
    return base.rpartition("/")[0] + "/" + name + mark + query


def join_path(path: str, *parts: str) -> str:
    """A path or URI below another one; a URI's query (its endpoint, its region) stays at the end."""
    base, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return "/".join([base.rstrip("/"), *parts]) + mark + query


def write_whole(path: str, content: bytes) -> None:
    """Writes a file at a local path or URI in one piece, and its folder; on a local disk it is durable then."""
    filesystem, inner = open_filesystem(path)
    filesystem.create_dir(inner.rpartition("/")[0], recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(inner) as stream:  # an object appears when it is whole
            stream.write(content)
        return
    with open(f"{inner}.part", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{inner}.part", inner)

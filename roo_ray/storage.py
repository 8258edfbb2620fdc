"""Where files lie: local paths and URIs through pyarrow's file systems."""

from __future__ import annotations

import os
import re

import pyarrow as pa
import pyarrow.fs as pafs

from roo_ray.errors import DataError


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """(file system, path in it) of a local path or URI. Raises DataError for an unknown scheme."""
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(path)
    try:
        filesystem, inner = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot open {path}: {error}; use a local path, s3://..., or gs://...") from None
    return filesystem, inner


def without_secrets(path: str) -> str:
    """A path or URI without the keys that may stand in it, to be kept and shown."""
    return re.sub(r"(?<=://)[^/@]*@", "", path.partition("?")[0])


def join_path(path: str, *parts: str) -> str:
    """A path or URI below another one; a URI's query (its endpoint, its region) stays at the end."""
    base, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return "/".join([base.rstrip("/"), *parts]) + mark + query

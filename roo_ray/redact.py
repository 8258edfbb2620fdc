"""Secrets by name: what must not be shown or logged of a config, an environment or a URI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(
    r"(?i)(password|passwd|secret|token|credential|private|access_?key|api_?key|account_?key|(^|_)key$)"
)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"([?&;](?:[^=&;\s]*))=([^&;\s]*)")


def is_secret(name: str) -> bool:
    """Whether a key of this name holds a secret: a password, token, secret or (access) key."""
    return bool(_NAMES.search(name.rpartition(".")[2]))


def redact_text(text: str) -> str:
    """A text without what URIs in it carry as credentials: the user's part, and parameters named as secrets."""

    def parameter(found: re.Match[str]) -> str:
        return f"{found[1]}={HIDDEN}" if is_secret(found[1][1:]) else found[0]

    if "://" not in text:
        return text
    return _QUERY.sub(parameter, _USER_INFO.sub(f"{HIDDEN}@", text))


def redact(content: Any, within: str = "") -> Any:
    """The same nested mappings and lists, with the values of secret keys and the credentials in URIs hidden.

    Only texts are secrets: ``history_tokens: 100`` and ``keys: {request: id}`` stay.
    """
    if isinstance(content, Mapping):
        return {name: redact(value, str(name)) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [redact(item, within) for item in content]
    if not isinstance(content, str):
        return content
    return HIDDEN if content and is_secret(within) else redact_text(content)

"""Secrets by name: what must not be shown or logged of a config, an environment, a URI, a message or a traceback."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(
    r"(?i)(password|passwd|secret|token|credential|private|access_?key|api_?key|account_?key|(^|_)key$)"
)
# up to the last @ before a slash; or a key with a slash in it (not after a port), which S3 takes percent-encoded alone
_USER_INFO = re.compile(r"(?<=://)(?:[^/\s'\"]+@|[^@\s/?#:'\"]*:(?!\d{1,5}/)[^@\s'\"]*@)")
_QUERY = re.compile(r"([?&;](?:[^=&;\s]*))=([^&;\s'\"]*)")
_HEADER = re.compile(r"(?i)\b(bearer\s+|basic\s+(?=[\w+/]{12}))[\w.~+/=-]+")
# NAME=value and NAME: value, of names that nothing but a secret has; quotes stay, so that JSON stays JSON
_SECRET_NAMES = r"\w*(?:password|passwd|secret|access_key|api_key|account_key|auth_token|session_token)\w*"
_ASSIGNED = re.compile(
    rf"(?i)(?<![?&;\w])((?:{_SECRET_NAMES}['\"]?\s*[:=]|token\s*=)\s*)"
    r"('[^'\n]*'|\"[^\"\n]*\"|[^\s,;'\"(){}\[\]]+)"
)


_JSON_LITERAL = re.compile(r"-?\d[\d.eE+-]*|null|true|false")


def is_secret(name: str) -> bool:
    """Whether a key of this name holds a secret: a password, token, secret or (access) key."""
    return bool(_NAMES.search(name.rpartition(".")[2]))


def redact_text(text: str) -> str:
    """A text without credentials: in URIs the user's part and parameters named as secrets, authorization headers, and
    values that are given to names such as ``password``."""

    def parameter(found: re.Match[str]) -> str:
        return f"{found[1]}={HIDDEN}" if is_secret(found[1][1:]) else found[0]

    def value(found: re.Match[str]) -> str:
        if found[1].rstrip().endswith(":") and _JSON_LITERAL.fullmatch(found[2]):
            return found[0]
        quote = found[0][-1] if found[0][-1] in "'\"" else ""
        return f"{found[1]}{quote}{HIDDEN}{quote}"

    text = _ASSIGNED.sub(value, _HEADER.sub(rf"\1{HIDDEN}", text))
    if "://" not in text:
        return text
    return _QUERY.sub(parameter, _USER_INFO.sub(f"{HIDDEN}@", text))


def redacted_traceback(error: BaseException) -> str:
    """The traceback of an error and of what caused it, without credentials that their messages carry."""
    return redact_text("".join(traceback.format_exception(error)))


def guard_process() -> None:
    """From here on, log records (also those of libraries, with their tracebacks) and errors that nothing catches, in
    any thread, come out of this process without credentials."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        try:
            text = made.getMessage()
        except Exception:  # a message that does not fit its arguments: logging says so
            return made
        if (clean := redact_text(text)) != text:
            made.msg, made.args = clean, None
        if made.exc_info and made.exc_info[1] is not None:
            made.exc_text = redacted_traceback(made.exc_info[1]).rstrip()  # formatters take it as it is
        return made

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)

    def uncaught(_: Any, error: BaseException, __: Any) -> None:
        print(redacted_traceback(error), end="", file=sys.stderr, flush=True)

    def uncaught_in_thread(happened: threading.ExceptHookArgs) -> None:
        if happened.exc_value is not None and not isinstance(happened.exc_value, SystemExit):
            name = happened.thread.name if happened.thread else "a thread"
            print(f"in {name}:\n{redacted_traceback(happened.exc_value)}", end="", file=sys.stderr, flush=True)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread


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

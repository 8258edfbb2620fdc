"""What every job's command line shares: config and overrides, error messages, exit codes, closing tables."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from roo_ray.config import Config, load_config
from roo_ray.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, BadInput, RooError, Stopped
from roo_ray.redact import guard_process, redact_text, redacted_traceback


def job_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every job takes: ``--config FILE`` and ``key=value`` overrides."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML config (see configs/), a path or URI")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides, such as training.epochs=2 ingest.lanes=8"
    )
    return parser


def read_config(options: argparse.Namespace) -> Config:
    """The validated config; a cluster address in it becomes ``RAY_ADDRESS``. Call before importing Ray."""
    config = load_config(options.config, options.overrides)
    if config.ray.address:
        os.environ["RAY_ADDRESS"] = config.ray.address
    return config


@contextmanager
def stopped_by_terminate() -> Iterator[None]:
    """The first SIGTERM interrupts the block, so that whatever is open is closed, and then raises Stopped; the next
    one ends the process at once. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def handle(number: int, frame: Any) -> None:
        nonlocal told
        told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt  # any other exception ray.get would print and go on waiting

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except KeyboardInterrupt:
        if told:
            raise Stopped("by SIGTERM; what was underway is not published: run the job again") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def run_job(main: Callable[[], None]) -> None:
    """Runs a job and exits: 0 done, 2 bad input, 1 another failure that roo_ray names (the message alone), 143 told
    to end by SIGTERM, 1 any other failure (with traceback). Messages, tracebacks and log records are shown without
    credentials."""
    guard_process()
    try:
        with stopped_by_terminate():
            main()
    except BadInput as error:
        print(f"\nerror: {redact_text(str(error))}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except Stopped as stopped:
        print(f"\nstopped: {redact_text(str(stopped))}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    except RooError as error:
        print(f"\nfailed: {redact_text(str(error))}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        print(redacted_traceback(error), end="", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILURE)
    sys.exit(EXIT_OK)


def human_bytes(count: float) -> str:
    """``12.3 MB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Prints a table: first column left, the others right aligned; without credentials that URIs in it carry."""
    table = Table(title=redact_text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(redact_text, row))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print()
    console.print(table)
    if note:
        console.print(redact_text(note))

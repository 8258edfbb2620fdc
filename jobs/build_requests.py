"""Impression logs to request shards: python jobs/build_requests.py --config configs/X.yaml [key=value ...]

With ``--through DAY`` (YYYY-MM-DD, UTC, or yesterday): the days after the newest one of the data set up to this one,
and nothing where it has them; so a night that has failed is made up for by the next one.
"""

from __future__ import annotations

import argparse
import datetime
import time

from roo_ray.terminal import job_parser, print_table, read_config, run_job


def utc_day(text: str) -> datetime.date:
    """A day of the command line."""
    if text == "yesterday":
        return datetime.datetime.now(datetime.timezone.utc).date() - datetime.timedelta(1)
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a day (YYYY-MM-DD) nor yesterday") from None


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--through", type=utc_day, metavar="DAY", help="the days that are missing up to this one")
    options = parser.parse_args()
    config = read_config(options)

    from roo_ray import session
    from roo_ray.requests.ledger import files_table, ledger_table
    from roo_ray.requests.rebuild import missing_days
    from roo_ray.requests.report import CheckFailed, report_json, report_table
    from roo_ray.training.prepare import prepare
    from roo_ray.training.progress import make_say
    from roo_ray.training.tracking import where_to_look

    say = make_say()
    if options.through is not None:
        days = missing_days(config.requests, options.through)
        if not days:
            say(f"nothing to do: {config.requests} has {options.through} or a day after it")
            return
        say(f"missing in {config.requests}: {', '.join(days)}")
        config = config.model_copy(update={"build": config.build.model_copy(update={"days": days})})
    run_name = config.run_name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        with session.connect(config.ray, None, say):
            manifest, run = prepare(config, run_name, say)
    except CheckFailed as refused:
        print_table("Validation report: refused, nothing is published", *report_table(report_json(refused.findings)))
        raise
    print_table("Validation report", *report_table(manifest.report))
    print_table("Impression-level against request-level", *ledger_table(manifest.ledger), manifest.ledger["how"])
    print_table("Files", *files_table(manifest.ledger))
    print_table(
        "Built",
        ["", ""],
        [
            *[[name.replace("_", " "), f"{count:,}"] for name, count in sorted(manifest.counts.items())],
            ["data set", f"{config.requests} (version {manifest.version})"],
        ],
        f"MLflow: {where_to_look(run)}",
    )


if __name__ == "__main__":
    run_job(main)

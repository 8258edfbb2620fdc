"""Impression logs to request shards: python jobs/build_requests.py --config configs/X.yaml [key=value ...]"""

from __future__ import annotations

import time

from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    config = read_config(job_parser(__doc__).parse_args())

    from roo_ray import session
    from roo_ray.requests.ledger import files_table, ledger_table
    from roo_ray.requests.report import CheckFailed, report_json, report_table
    from roo_ray.training.prepare import prepare
    from roo_ray.training.progress import make_say
    from roo_ray.training.tracking import where_to_look

    say = make_say()
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

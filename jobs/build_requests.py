"""Impression logs to request shards: python jobs/build_requests.py --config configs/X.yaml [key=value ...]"""

from __future__ import annotations

import time

from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    config = read_config(job_parser(__doc__).parse_args())

    from roo_ray import session
    from roo_ray.requests.ledger import ledger_table
    from roo_ray.training.prepare import prepare
    from roo_ray.training.progress import make_say
    from roo_ray.training.tracking import where_to_look

    say = make_say()
    run_name = config.run_name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with session.connect(config.ray):
        manifest, run = prepare(config, run_name, say)
    header, rows = ledger_table(manifest.ledger)
    print_table("Impression-level against request-level", header, rows)
    print_table(
        "Built",
        ["", ""],
        [
            *[[name.replace("_", " "), f"{count:,}"] for name, count in sorted(manifest.counts.items())],
            ["data set", f"{config.requests} (version {manifest.version})"],
            ["MLflow", where_to_look(run)],
        ],
    )


if __name__ == "__main__":
    run_job(main)

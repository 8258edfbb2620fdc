"""Does training on requests pay? python jobs/compare.py --config configs/compare.yaml [key=value ...]

Trains the request-level and the impression-level form on the same requests with the same seeds, then both again for the
same wall time, and logs one comparison. Builds the request data set first where it does not exist yet.
"""

from __future__ import annotations

import time

from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--seconds", type=float, help="wall time of the second arm (default: half of the first's)")
    options = parser.parse_args()
    config = read_config(options)

    from roo_ray import session
    from roo_ray.requests.manifest import manifest_versions
    from roo_ray.review.forms import compare_forms, comparison_rows
    from roo_ray.training.prepare import prepare
    from roo_ray.training.progress import make_say
    from roo_ray.training.tracking import where_to_look

    say = make_say()
    run_name = config.run_name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with session.connect(config.ray, config.training, say):
        if not manifest_versions(config.requests):
            prepare(config, run_name, say)
        compared = compare_forms(config, run_name, say, options.seconds)
    print_table(
        f"Request-level against impression-level: '{run_name}'",
        ["", "request-level", "impression-level", "ratio or difference"],
        comparison_rows(compared, config.request_schema.labels[0].name),
        f"MLflow: {where_to_look(compared.run)}",
    )


if __name__ == "__main__":
    run_job(main)

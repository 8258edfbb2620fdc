"""Trains a request-only model: python jobs/train.py --config configs/X.yaml [key=value ...]

Builds the request data set first where it does not exist yet and the config has a source. The same run_name
goes on with the same run. With a section ``incremental`` in the config: day by day, from the published model; the
days that are published already are not trained again.
"""

from __future__ import annotations

import time

from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    options = job_parser(__doc__).parse_args()
    config = read_config(options)

    from roo_ray import session
    from roo_ray.requests.manifest import manifest_versions
    from roo_ray.training.incremental import run_days
    from roo_ray.training.launch import train
    from roo_ray.training.layout import refuse_unordered
    from roo_ray.training.prepare import prepare
    from roo_ray.training.progress import make_say
    from roo_ray.training.summary import not_finite_rows, number, quality_rows
    from roo_ray.training.tracking import where_to_look

    say = make_say()
    run_name = config.run_name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    build = config.source is not None and not manifest_versions(config.requests)
    later = build and config.ray.wait_for_nodes_s  # no trainers' nodes idle while the data is built
    series = config.run_name or config.name
    refuse_unordered(config, series)
    with session.connect(config.ray, config.training, say, "data" if later else "all"):
        if build:
            say(f"no request data set at {config.requests} yet: building it")
            prepare(config, run_name, say, job="train")
            refuse_unordered(config, series)
            session.make_ready(config.ray, config.training, say)
        elif config.source is not None:
            say(f"the request data set at {config.requests} is there; jobs/build_requests.py builds it anew")
        if config.incremental is not None:
            done, published, parent = run_days(config, series, say)
        else:
            result = train(config, run_name, say)
    if config.incremental is not None:
        task = config.request_schema.labels[0].name
        kinds = ("ne_before", "ne_published", "ne_new")
        print_table(
            f"Published '{series}'",
            ["day", "NE before, whole day", "NE published, held out", "NE new, held out"],
            [[one.day, *(number(one.metrics.get(f"{task}/{kind}")) for kind in kinds)] for one in done],
            f"published: {published.last.checkpoint if published else 'nothing'}\n"
            f"MLflow: {where_to_look(parent) if parent else 'nothing was to be done'}",
        )
        return
    print_table(
        f"Trained '{run_name}'",
        ["", "held-out"],
        [
            *quality_rows(result.metrics),
            ["training impressions/s", f"{result.metrics['epoch/impressions_per_second']:,.0f}"],
            ["training requests/s", f"{result.metrics['epoch/requests_per_second']:,.0f}"],
            ["share of time waiting for data", f"{result.metrics['epoch/data_wait_share']:.1%}"],
            *not_finite_rows(result.metrics),
            ["checkpoint", result.checkpoint],
        ],
        f"MLflow: {where_to_look(result.run)}\n"
        f"Next: python jobs/evaluate.py --config {options.config} --checkpoint {run_name}",
    )


if __name__ == "__main__":
    run_job(main)

"""Completes the MLflow run of a finished training: python jobs/review.py --config configs/X.yaml run_name=NAME

For a training whose MLflow server was away when it ended: sends what waits on this machine, then logs the model, the
data set and the pictures that are missing. Needs no Ray. Run twice, it logs and registers nothing twice.
"""

from __future__ import annotations

from roo_ray.terminal import job_parser, read_config, run_job


def main() -> None:
    config = read_config(job_parser(__doc__).parse_args())

    from roo_ray.errors import ConfigError
    from roo_ray.review.again import review_again
    from roo_ray.training.progress import make_say
    from roo_ray.training.tracking import where_to_look

    if config.run_name is None:
        raise ConfigError("name the run: run_name=NAME (of a day of a series: SERIES-DAY)")
    run = review_again(config, config.run_name, make_say())
    print(f"complete: {where_to_look(run)}")


if __name__ == "__main__":
    run_job(main)

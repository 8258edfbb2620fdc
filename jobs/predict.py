"""Scores a request data set:
python jobs/predict.py --config configs/X.yaml --model MODEL --output FOLDER [key=value ...]

MODEL: a run's name, a checkpoint, an exported model, or an MLflow model (models:/NAME/VERSION). Writes Parquet, a row
per impression: request key, impression key, score_<task>. The user side runs once per request.
"""

from __future__ import annotations

import time

from roo_ray.source_config import resolve_path
from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--model", required=True, help="run name, checkpoint, exported model or MLflow model")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a folder or URI that does not exist yet")
    parser.add_argument("--actors", type=int, default=1, help="scoring processes (default 1)")
    options = parser.parse_args()
    config = read_config(options)

    from roo_ray import session
    from roo_ray.serving.predict import predict
    from roo_ray.training.progress import make_say
    from roo_ray.training.tracking import where_to_look

    say = make_say()
    begin = time.perf_counter()
    with session.connect(config.ray, None, say):
        done = predict(config, options.model, resolve_path(options.output), say, options.actors)
    seconds = time.perf_counter() - begin
    print_table(
        f"Scored {config.requests}",
        ["", "in all", "per second, start-up included"],
        [
            ["requests", f"{done.requests:,}", f"{done.requests / seconds:,.0f}"],
            ["impressions", f"{done.impressions:,}", f"{done.impressions / seconds:,.0f}"],
            ["files", f"{done.files:,}", ""],
        ],
        f"output: {done.output}\nMLflow: {where_to_look(done.run)}",
    )


if __name__ == "__main__":
    run_job(main)

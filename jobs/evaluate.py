"""Scores a checkpoint on a data set's held-out side:
python jobs/evaluate.py --config configs/X.yaml --checkpoint RUN_OR_PATH [key=value ...]

The checkpoint is a run's name or a checkpoint's path or URI; model and schema are read from it.
"""

from __future__ import annotations

import time

from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_PATH", help="run name, path or URI")
    options = parser.parse_args()
    config = read_config(options)

    from roo_ray import session
    from roo_ray.training.launch import evaluate, find_checkpoint
    from roo_ray.training.progress import make_say
    from roo_ray.training.summary import quality_rows
    from roo_ray.training.tracking import where_to_look

    checkpoint = find_checkpoint(config, options.checkpoint)
    run_name = f"{config.run_name or config.name}-evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    say = make_say()
    with session.connect(config.ray, config.training, say):
        result = evaluate(config, checkpoint, run_name, say)
    print_table(
        f"Evaluated {checkpoint}",
        ["", "held-out"],
        [
            *quality_rows(result.metrics),
            ["impressions", f"{result.metrics['eval/impressions']:,.0f}"],
            ["requests", f"{result.metrics['eval/requests']:,.0f}"],
            ["impressions/s", f"{result.metrics['eval/impressions_per_second']:,.0f}"],
        ],
        f"MLflow: {where_to_look(result.run)}",
    )


if __name__ == "__main__":
    run_job(main)

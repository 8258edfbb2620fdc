"""Scores a checkpoint on a data set's held-out side:
python jobs/evaluate.py --config configs/X.yaml --checkpoint RUN_OR_PATH [key=value ...]

The checkpoint is a run's name or a checkpoint's path or URI; model and schema are read from it. With --against, a
second checkpoint is scored on the same requests, and the differences come with paired bootstrap intervals. With
--items, a retrieval checkpoint's recall is measured among the items of a file that jobs/export_items.py wrote from it;
without, among those that the held-out requests have shown.
"""

from __future__ import annotations

import time

from roo_ray.source_config import resolve_path
from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_PATH", help="run name, path or URI")
    parser.add_argument("--against", metavar="RUN_OR_PATH", help="a second model to compare with")
    parser.add_argument("--unit", choices=["request", "user"], default="request", help="what is resampled")
    parser.add_argument("--replicates", type=int, default=1000, help="resamples (default 1000)")
    parser.add_argument("--items", metavar="FILE", help="the checkpoint's exported items, to look among")
    options = parser.parse_args()
    if options.items and options.against:
        parser.error("--items is of one checkpoint, and --against compares two; give one of them")
    config = read_config(options)

    from roo_ray import session
    from roo_ray.review.evaluation import compare_models, difference_rows
    from roo_ray.training.folder import find_checkpoint
    from roo_ray.training.launch import evaluate
    from roo_ray.training.progress import make_say
    from roo_ray.training.summary import quality_rows
    from roo_ray.training.tracking import where_to_look

    checkpoint = find_checkpoint(config, options.checkpoint)
    run_name = f"{config.run_name or config.name}-evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    say = make_say()
    if options.against:
        other = find_checkpoint(config, options.against)
        with session.connect(config.ray, config.training, say):
            compared = compare_models(config, checkpoint, other, run_name, options.unit, options.replicates, say)
        print_table(
            f"{options.against} against {options.checkpoint}",
            ["", "first", "second", "difference", "95 % interval", "significant", "second is better in"],
            difference_rows(compared),
            f"{compared.requests:,} requests, {compared.impressions:,} impressions; {compared.units:,} {options.unit}s "
            f"resampled {options.replicates:,} times\nMLflow: {where_to_look(compared.run)}",
        )
        return
    with session.connect(config.ray, config.training, say):
        items = resolve_path(options.items) if options.items else None
        result = evaluate(config, checkpoint, run_name, say, items=items)
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

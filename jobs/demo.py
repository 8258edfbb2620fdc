"""The main job on a synthetic log, from nothing: generate, build, train, evaluate, and what it was worth.

python jobs/demo.py --config configs/demo.yaml [key=value ...]; ``make demo`` runs it.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from roo_ray.errors import ConfigError
from roo_ray.source_config import home
from roo_ray.terminal import human_bytes, job_parser, print_table, read_config, run_job


def start_afresh(*paths: str) -> None:
    """Removes what an earlier demo left; only within ``demo`` in roo_ray's home."""
    for path in paths:
        if "://" in path or home() / "demo" not in Path(os.path.normpath(path)).parents:
            raise ConfigError(f"the demo clears its paths first and only touches {home() / 'demo'}, not {path}")
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    config = read_config(job_parser(__doc__).parse_args())
    if config.source is None or config.source.kind != "synthetic":
        raise ConfigError("the demo needs a synthetic source; use jobs/train.py for your own data")
    start_afresh(config.source.path, config.requests)

    from roo_ray import session
    from roo_ray.requests.ledger import ledger_table
    from roo_ray.training.launch import evaluate, train
    from roo_ray.training.prepare import prepare
    from roo_ray.training.progress import make_say
    from roo_ray.training.tracking import where_to_look

    begin = time.perf_counter()
    say = make_say()
    run_name = config.run_name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with session.connect(config.ray, config.training, say):
        manifest, _ = prepare(config, run_name, say, job="train")
        trained = train(config, run_name, say)
        evaluated = evaluate(config, trained.checkpoint, f"{run_name}-evaluate", say)

    header, rows = ledger_table(manifest.ledger)
    print_table("What the request as a row saves, per column", header, rows)
    metrics = evaluated.metrics
    task = config.request_schema.labels[0].name
    print_table(
        f"The demo in {time.perf_counter() - begin:.0f} s",
        ["", "impression-level", "request-level", "ratio"],
        [
            [
                "rows",
                f"{manifest.impressions:,}",
                f"{manifest.requests:,}",
                f"{manifest.impressions / manifest.requests:.1f}x",
            ],
            *storage_rows(manifest.ledger["totals"]),
        ],
    )
    print_table(
        "The model on the held-out day",
        ["", "base rate", "trained", "Bayes optimum"],
        [
            [
                "NE (lower is better)",
                "1.0000",
                f"{metrics[f'eval/{task}/ne']:.4f}",
                f"{metrics[f'eval/{task}/bayes_ne']:.4f}",
            ],
            ["AUC", "0.5000", f"{metrics[f'eval/{task}/auc']:.4f}", f"{metrics[f'eval/{task}/bayes_auc']:.4f}"],
            ["GAUC by request", "0.5000", f"{metrics[f'eval/{task}/gauc']:.4f}", ""],
            ["calibration", "1.0000", f"{metrics[f'eval/{task}/calibration']:.4f}", ""],
            ["impressions/s, training", "", f"{trained.metrics['epoch/impressions_per_second']:,.0f}", ""],
            ["requests/s, training", "", f"{trained.metrics['epoch/requests_per_second']:,.0f}", ""],
        ],
        f"checkpoint: {trained.checkpoint}\nMLflow: {where_to_look(trained.run)}",
    )


def storage_rows(totals: dict[str, dict[str, float]]) -> list[list[str]]:
    """Bytes on disk and elements, impression-level against request-level."""
    rows = []
    for name, title in (("disk_bytes", "bytes on disk"), ("elements", "elements")):
        before, after = totals[name]["impression"], totals[name]["request"]
        show = human_bytes if name == "disk_bytes" else "{:,.0f}".format
        rows.append([title, show(before), show(after), f"{before / after:.1f}x"])
    return rows


if __name__ == "__main__":
    run_job(main)

"""The item vectors of a retrieval run, of all items of the data set, as Parquet (item, row, vector):
python jobs/export_items.py --config configs/X.yaml --checkpoint RUN_OR_PATH --out FILE [key=value ...]

The checkpoint is a run's name or a checkpoint's path or URI; model and schema are read from it. Needs no Ray.
"""

from __future__ import annotations

from roo_ray.source_config import resolve_path
from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_PATH", help="run name, path or URI")
    parser.add_argument("--out", required=True, metavar="FILE", help="the Parquet file to write, path or URI")
    options = parser.parse_args()
    config = read_config(options)

    from roo_ray.training.export_items import export_items
    from roo_ray.training.folder import find_checkpoint
    from roo_ray.training.progress import make_say

    checkpoint = find_checkpoint(config, options.checkpoint)
    done = export_items(config, checkpoint, resolve_path(options.out), make_say())
    print_table(
        "Exported items",
        ["", ""],
        [
            ["checkpoint", checkpoint],
            ["item vectors", done.path],
            ["items", f"{done.items:,}"],
            ["that share a row of their table", f"{done.sharing:,}"],
            ["floats each", f"{done.dim:,}"],
            ["requests read", f"{done.requests:,}"],
            ["impressions read", f"{done.impressions:,}"],
        ],
    )


if __name__ == "__main__":
    run_job(main)

"""Makes an impression table trainable as it is, without rewriting it:
python jobs/index_impressions.py --config configs/X.yaml [--cluster COLUMN,...] [key=value ...]

The config's source is the table (kind impressions), whose rows of a request must lie together, or of a session
(--cluster session_id). What is published at ``requests`` is an index of it; train and evaluate as on shards.
"""

from __future__ import annotations

from roo_ray.errors import ConfigError
from roo_ray.terminal import job_parser, print_table, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--cluster", default="", metavar="COLUMN[,COLUMN]", help="what the table is clustered by")
    options = parser.parse_args()
    config = read_config(options)
    if config.source is None or config.source.kind != "impressions":
        raise ConfigError("only a source of kind impressions can be indexed; set source.kind and source.path")

    from roo_ray.ingest.clustered import index_impressions

    cluster = [name for name in options.cluster.split(",") if name]
    unit = config.build.row_group_requests
    manifest = index_impressions(config.requests, config.source.path, config.request_schema, cluster, unit)
    print_table(
        "Indexed",
        ["", ""],
        [
            ["requests", f"{manifest.requests:,}"],
            ["impressions", f"{manifest.impressions:,}"],
            ["units", f"{sum(len(file.units) for file in manifest.files):,}"],
            ["data set", f"{config.requests} (version {manifest.version})"],
        ],
        "Next: python jobs/train.py --config FILE",
    )


if __name__ == "__main__":
    run_job(main)

"""A request data set back to an impression table: python jobs/explode_requests.py --config FILE --out PATH"""

from __future__ import annotations

import argparse

from roo_ray.config import RaySettings
from roo_ray.errors import ConfigError
from roo_ray.source_config import resolve_path
from roo_ray.terminal import human_bytes, print_table, read_config, run_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML config; its data set (requests) is exploded")
    parser.add_argument("--requests", metavar="PATH", help="the data set, instead of a config")
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder or URI of the impression table")
    parser.add_argument("--version", type=int, metavar="N", help="a version of the data set; default: the newest")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    options = parser.parse_args()
    if (options.config is None) == (options.requests is None):
        raise ConfigError("give either --config FILE or --requests PATH")
    if options.requests and options.overrides:
        raise ConfigError(f"'{options.overrides[0]}' is an override of a config, and there is none")
    config = read_config(options) if options.config else None

    from roo_ray import session
    from roo_ray.requests.explode import explode_data_set
    from roo_ray.requests.manifest import load_manifest
    from roo_ray.training.progress import make_say

    data_set = config.requests if config else resolve_path(options.requests)
    load_manifest(data_set, options.version)  # says what is wrong before Ray starts
    say = make_say()
    with session.connect(config.ray if config else RaySettings()):
        table = explode_data_set(data_set, resolve_path(options.out), say, options.version)
    print_table(
        "Exploded",
        ["", ""],
        [
            ["data set", f"{data_set} (version {table.version})"],
            ["impression table", table.path],
            ["files", f"{table.files:,}"],
            ["requests", f"{table.requests:,}"],
            ["impressions", f"{table.impressions:,}"],
            ["bytes", human_bytes(table.bytes)],
        ],
    )


if __name__ == "__main__":
    run_job(main)

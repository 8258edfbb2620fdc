"""What request-only grouping would save on an impression table, before anything is adopted:

python jobs/profile_impressions.py TABLE [TABLE ...] --request-key request_id [--out schema.yaml]

TABLE: Parquet files or folders, local or s3:// / gs://, one row per impression. Prints which columns are constant
within requests, a suggested schema, and the bytes, values and step time that request shards are predicted to save.
Works on a sample of whole requests; changes nothing.
"""

from __future__ import annotations

import argparse
import json

from roo_ray.config import Model, load_config
from roo_ray.errors import ConfigError
from roo_ray.terminal import print_table, run_job


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("table", nargs="+", metavar="TABLE", help="Parquet files or folders")
    made.add_argument("--request-key", nargs="+", required=True, metavar="COLUMN", help="columns that name a request")
    made.add_argument("--user", metavar="COLUMN", help="the request's user (default: guessed)")
    made.add_argument("--time", metavar="COLUMN", help="the request's time (default: guessed)")
    made.add_argument("--label", nargs="+", default=[], metavar="COLUMN", help="label columns (default: guessed)")
    made.add_argument("--model", metavar="CONFIG", help="a job config whose model is costed (default: the defaults)")
    made.add_argument(
        "--sample-requests", type=int, default=20_000, metavar="N", help="requests (default: %(default)s)"
    )
    made.add_argument("--name", default="suggested", help="the schema's name (default: %(default)s)")
    made.add_argument("--out", metavar="FILE", help="write the suggested schema to a path or URI")
    made.add_argument("--json", metavar="FILE", help="write the whole profile to a path or URI")
    return made


def main() -> None:
    options = parser().parse_args()
    if options.sample_requests < 1:
        raise ConfigError(f"--sample-requests {options.sample_requests}: at least 1")
    model = load_config(options.model).model if options.model else Model()

    from roo_ray.redact import redact_text
    from roo_ray.requests import profile, profile_savings
    from roo_ray.requests.profile_schema import Roles, suggest_schema
    from roo_ray.storage import write_whole

    named = [column for column in (options.user, options.time, *options.label) if column]
    table = profile.open_table(options.table, options.request_key, named)
    sample = profile.take_sample(table, options.sample_requests)
    use = profile.analyse(sample, table.key)
    about = "" if sample.exact else "about "
    print_table(
        "Columns within requests",
        *profile_savings.use_table(use, table.key),
        f"Sample: {sample.requests:,} whole requests with {sample.rows.num_rows:,} of {table.rows:,} impressions, of "
        f"{about}{sample.all_requests:,} requests."
        + (f" {sample.null_keys:,} rows have a null in the request key and are left out." if sample.null_keys else "")
        + " (!) nearly constant: build with on_request_conflict, or correct the log.",
    )
    roles = Roles(options.user, options.time, list(options.label))
    schema = suggest_schema(options.name, sample.rows, use, table.key, roles)
    savings = profile_savings.predict_savings(table, sample, schema, model)
    print(f"\nSuggested schema{' (guessed: ' + '; '.join(roles.guessed) + ')' if roles.guessed else ''}\n")
    print(schema.to_yaml())
    print_table(
        "Predicted savings",
        *profile_savings.savings_table(savings),
        f"Logged: the files as they are ({table.codec}). Sorted by request, and grouped: the sample written in zstd "
        "level 3, scaled to the table; requests of one user compress each other better in the whole than in a sample.",
    )
    cost = savings.cost
    print_table(
        "Predicted step of the model (a formula, nothing was run)",
        ["", "impression-level", "request-level", "ratio"],
        [
            [
                "operations",
                f"{cost.impression_level:,.3g}",
                f"{cost.request_level:,.3g}",
                f"{cost.speed_up:.2f}x",
            ],
            [
                "embedding lookups",
                f"{cost.lookups_impression_level:,}",
                f"{cost.lookups_request_level:,}",
                f"{cost.lookup_ratio:.2f}x",
            ],
        ],
        f"{savings.mean_impressions:.1f} impressions a request"
        + "".join(f", {mean:.0f} events in {name}" for name, mean in savings.mean_history.items()),
    )
    if options.out:
        write_whole(options.out, schema.to_yaml().encode())
        print(redact_text(f"\nschema written to {options.out}"))
    if options.json:
        content = profile_savings.profile_json(sample, use, schema, savings)
        write_whole(options.json, json.dumps(content, indent=1, default=str).encode())


if __name__ == "__main__":
    run_job(main)

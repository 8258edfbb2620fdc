"""Removes all requests of users from a data set: python jobs/forget_users.py --config FILE --users FILE|id,id,..."""

from __future__ import annotations

import json

from roo_ray.errors import ConfigError
from roo_ray.terminal import human_bytes, job_parser, print_table, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__ or "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--users", metavar="FILE|IDS", help="ids with commas, a text file (one per line) or Parquet")
    what.add_argument("--resume-purge", action="store_true", help="only finish a purge that was interrupted")
    parser.add_argument("--report", metavar="FILE", help="write the report as JSON, to a path or URI")
    options = parser.parse_args()
    if options.report and options.resume_purge:
        raise ConfigError("--report is for --users; --resume-purge only says how many files it deleted")
    config = read_config(options)

    from roo_ray import session
    from roo_ray.redact import redact_text
    from roo_ray.requests.forget import forget_users, resume_purge
    from roo_ray.requests.manifest import load_manifest
    from roo_ray.storage import write_whole
    from roo_ray.training.progress import make_say

    load_manifest(config.requests)  # says what is wrong before Ray starts
    if options.resume_purge:
        deleted = resume_purge(config.requests)
        print(redact_text(f"{config.requests}: {len(deleted):,} files of purged versions deleted"))
        return
    with session.connect(config.ray):
        report = forget_users(config.requests, options.users, config.build, make_say())
    if options.report:
        write_whole(options.report, json.dumps(report.as_json(), indent=1).encode())
    more = report.users_given - report.users_found - len(report.not_found)
    missing = ", ".join(report.not_found) + (f" and {more:,} more" if more else "")
    print_table(
        "Forgotten" if report.version else "Nothing to forget: no version holds any of the users",
        ["", ""],
        [
            ["data set", f"{report.data_set} (version {report.version or 'unchanged'})"],
            ["users given", f"{report.users_given:,}"],
            ["users found", f"{report.users_found:,}"],
            ["users not found", missing or "none"],
            ["requests removed", f"{report.requests_removed:,}"],
            ["impressions removed", f"{report.impressions_removed:,}"],
            ["rows kept aside removed", f"{report.aside_rows_removed:,}"],
            ["files rewritten / kept", f"{report.files_rewritten:,} / {report.files_kept:,}"],
            ["bytes before / after", f"{human_bytes(report.bytes_before)} / {human_bytes(report.bytes_after)}"],
            ["versions purged", ", ".join(map(str, report.purged)) or "none"],
            ["files deleted", f"{report.deleted:,}"],
        ],
        note="The source still holds these users: remove them there too, or the next build brings them back."
        + (
            f"\nNot checked, as they have no user column: {', '.join(report.aside_unchecked)}"
            if report.aside_unchecked
            else ""
        ),
    )


if __name__ == "__main__":
    run_job(main)

"""Checks a cluster and a config before money is spent: python jobs/preflight.py --config configs/X.yaml [key=value ...]

One line a check: ok, warn or fail, with what to do. Exits with 2 where a check fails. Starts no training.
"""

from __future__ import annotations

import os

from roo_ray.errors import BadInput, ClusterError
from roo_ray.terminal import job_parser, read_config, run_job


def main() -> None:
    config = read_config(job_parser(__doc__).parse_args())

    from roo_ray import session
    from roo_ray.cluster import preflight
    from roo_ray.cluster.findings import Finding, fail, ok, warn, worst
    from roo_ray.cluster.links import measure_links
    from roo_ray.cluster.places import workers_wanted
    from roo_ray.cluster.probe import probe_nodes
    from roo_ray.cluster.sizing import UnitCosts, memory_of, shape_of
    from roo_ray.redact import redact_text
    from roo_ray.requests.manifest import load_manifest, manifest_versions

    found: list[Finding] = []
    workers = workers_wanted(config)

    def show(findings: list[Finding]) -> None:
        found.extend(findings)
        for finding in findings:
            print(redact_text(finding.line()), flush=True)

    with session.connect(config.ray, config.training, print, check="nothing"):
        tracking = (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")) if config.tracking.enabled else None
        nodes, silent = probe_nodes([config.storage], [config.requests], tracking)
        show([*preflight.check_silent(silent), *preflight.check_versions(nodes)])
        show(preflight.check_places(config, nodes))
        try:
            training = config.training
            session.require_resources(config.ray, workers, training.gpu)
            show([ok("resources", "enough CPUs and GPUs, and they are free")])
        except ClusterError as error:
            level = warn if config.ray.wait_for_nodes_s else fail
            show([level("resources", str(error), "see places")])
        places = [place for place in (config.storage, config.requests, tracking) if place]
        show([*preflight.check_reach(nodes, places), *preflight.check_memory(nodes)])
        show(preflight.check_local_paths(nodes, [config.storage, config.requests]))
        if tracking is None and config.tracking.enabled and len(nodes) > 1:
            show([fail("mlflow", "the store is an SQLite file, on several nodes", "set tracking.uri to a server")])
        state = 0.0
        try:
            if manifest_versions(config.requests):
                shape = shape_of(config, load_manifest(config.requests, config.requests_version))
                state = sum(size for size, _ in shape.table_bytes.values()) / workers
                costs = UnitCosts(fixed_s=0, per_megaflop_s=1)
                show(preflight.check_plan(memory_of(shape, workers, costs), nodes, config))
            else:
                show([warn("plan", f"no data set at {config.requests} yet", "build it, then ask again")])
        except (BadInput, OSError) as error:  # a store that does not answer is an answer
            show([fail("plan", f"{config.requests}: {error}", "see reach; mend the config or the data")])
        show(preflight.check_grace(nodes, state / 2e8))
        if any(finding.check in ("places", "resources") and finding.level != "ok" for finding in found):
            show([warn("network", "not measured: the workers have no places yet", "ask again when they have")])
        else:
            show(preflight.check_links(lambda: measure_links(config)))
    if worst(found) == "fail":
        raise ClusterError(f"{sum(finding.level == 'fail' for finding in found)} checks failed; see above")
    print(f"ready: {len(found)} checks, {sum(finding.level == 'warn' for finding in found)} warnings")


if __name__ == "__main__":
    run_job(main)

"""Checks a cluster and a config before money is spent:
python jobs/preflight.py --config configs/X.yaml [--costs FILE] [key=value ...]

``--costs``: measured unit costs (benchmarks/sizing.py --costs), so that the plan's memory counts activations too.
One line a check: ok, warn or fail, with what to do. Exits with 2 where a check fails. Starts no training.
"""

from __future__ import annotations

import os

from roo_ray.errors import BadInput, ClusterError
from roo_ray.terminal import job_parser, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--costs", metavar="FILE", help="measured unit costs, for the memory of activations")
    options = parser.parse_args()
    config = read_config(options)

    from roo_ray import session
    from roo_ray.cluster import preflight
    from roo_ray.cluster.findings import Finding, fail, ok, warn, worst
    from roo_ray.cluster.links import measure_links
    from roo_ray.cluster.places import workers_least
    from roo_ray.cluster.price_files import read_costs
    from roo_ray.cluster.probe import probe_nodes
    from roo_ray.cluster.sizing import UnitCosts, memory_of, shape_of
    from roo_ray.redact import redact_text
    from roo_ray.requests.manifest import load_manifest, manifest_versions

    found: list[Finding] = []
    costs = read_costs(options.costs) if options.costs else UnitCosts(fixed_s=0, per_megaflop_s=1)

    def show(findings: list[Finding]) -> None:
        found.extend(findings)
        for finding in findings:
            print(redact_text(finding.line()), flush=True)

    with session.connect(config.ray, config.training, print, check="nothing"):
        tracking = (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")) if config.tracking.enabled else None
        nodes, silent = probe_nodes([config.storage], [config.requests], tracking)
        show(preflight.check_nodes(nodes, silent))
        if not nodes:
            raise ClusterError("no node answers: there is nothing else to check; see above")
        show(preflight.check_versions(nodes))
        show(preflight.check_places(config, nodes))
        workers = preflight.workers_here(config, nodes)
        there = preflight.room_for(config, nodes) >= workers
        try:
            training = config.training
            session.require_resources(config.ray, workers_least(config), training.gpu)
            show([ok("resources", "enough CPUs and GPUs, and they are free")])
        except ClusterError as error:
            there = False
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
                memory, counted = memory_of(shape, workers, costs), costs.activation_bytes_per_megaflop > 0
                show(preflight.check_plan(memory, nodes, config, counted))
            else:
                show([warn("plan", f"no data set at {config.requests} yet", "build it, then ask again")])
        except (BadInput, OSError) as error:  # a store that does not answer is an answer
            show([fail("plan", f"{config.requests}: {error}", "see reach; mend the config or the data")])
        show(preflight.check_grace(nodes, state / costs.checkpoint_bandwidth))
        if not there:
            show([warn("network", "not measured: the workers have no places yet", "ask again when they have")])
        else:
            show(preflight.check_links(lambda: measure_links(config, workers=workers)))
    if worst(found) == "fail":
        raise ClusterError(f"{sum(finding.level == 'fail' for finding in found)} checks failed; see above")
    print(f"ready: {len(found)} checks, {sum(finding.level == 'warn' for finding in found)} warnings")


if __name__ == "__main__":
    run_job(main)

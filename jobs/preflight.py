"""Checks a cluster and a config before money is spent:
python jobs/preflight.py --config configs/X.yaml [--bring] [--costs FILE] [key=value ...]

``--costs``: measured unit costs (benchmarks/sizing.py --costs), so that the plan's memory counts activations too.
``--bring``: waits for the run's nodes first, as the run would, on an autoscaled cluster (``ray.wait_for_nodes_s``).
One line a check: ok, warn, skip (not checked: it is not there) or fail, with what to do. Exits with 2 where a check
fails, with 1 where one could not be made. Starts no training.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from roo_ray.errors import BadInput, ClusterError, NotChecked
from roo_ray.terminal import job_parser, read_config, run_job


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--costs", metavar="FILE", help="measured unit costs, for the memory of activations")
    parser.add_argument("--bring", action="store_true", help="wait for the run's nodes first, as the run would")
    options = parser.parse_args()
    config = read_config(options)

    from roo_ray import session
    from roo_ray.cluster import preflight
    from roo_ray.cluster.findings import Finding, fail, ok, skip, worst
    from roo_ray.cluster.links import measure_links
    from roo_ray.cluster.places import build_reads, workers_least
    from roo_ray.cluster.price_files import read_costs
    from roo_ray.cluster.probe import probe_nodes
    from roo_ray.cluster.sizing import UnitCosts, memory_of, shape_of, state_bytes
    from roo_ray.redact import redact_text
    from roo_ray.requests.manifest import load_manifest, manifest_versions
    from roo_ray.training.layout import refuse_unordered
    from roo_ray.training.tracking import tracking_uri

    found: list[Finding] = []
    costs = read_costs(options.costs) if options.costs else UnitCosts(fixed_s=0, per_megaflop_s=1)

    def show(findings: list[Finding]) -> None:
        found.extend(findings)
        for finding in findings:
            print(redact_text(finding.line()), flush=True)

    with session.connect(config.ray, config.training, print, check="nothing"):
        with ExitStack() as held:
            if options.bring:
                try:
                    held.enter_context(session.nodes_held(config.ray, config.training, print))
                except ClusterError as error:
                    show([fail("nodes", str(error), "see places")])
            tracking = None
            if config.tracking.enabled:
                try:
                    uri = tracking_uri(config.tracking, session.alive_nodes())
                    tracking = None if uri.startswith("sqlite:") else uri
                except ClusterError as error:
                    show([fail("mlflow", str(error), "set tracking.uri to a server")])
            source = build_reads(config)
            written = [config.storage, *([config.requests] if config.source else [])]
            nodes, silent = probe_nodes(written, [config.requests], tracking, source, config.ray.data_labels)
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
            level = skip if config.ray.wait_for_nodes_s and not options.bring else fail
            show([level("resources", str(error), "see places")])
        places = [place for place in (config.storage, config.requests, *source, tracking) if place]
        show([*preflight.check_reach(nodes, places), *preflight.check_memory(nodes)])
        show(preflight.check_local_paths(nodes, written, [config.requests, *source]))
        state = 0.0
        try:
            if manifest_versions(config.requests):
                shape = shape_of(config, load_manifest(config.requests, config.requests_version))
                state = state_bytes(shape) / workers
                memory, counted = memory_of(shape, workers, costs), costs.activation_bytes_per_megaflop > 0
                show(preflight.check_plan(memory, nodes, config, counted))
                look = partial(refuse_unordered, config, config.run_name or config.name)
                show(preflight.check_order(config, look))
            else:
                show(preflight.check_order(config, None))
                show([skip("plan", f"no data set at {config.requests} yet", "build it, then ask again")])
        except (BadInput, OSError) as error:  # a store that does not answer is an answer
            show([fail("plan", f"{config.requests}: {error}", "see reach; mend the config or the data")])
        show(preflight.check_grace(nodes, state / costs.checkpoint_bandwidth))
        if not there:
            show([skip("network", "the workers have no places", preflight.BRING)])
        else:
            show(preflight.check_links(lambda: measure_links(config, workers=workers)))
    if worst(found) == "fail":
        raise ClusterError(f"{sum(finding.level == 'fail' for finding in found)} checks failed; see above")
    if worst(found) == "skip":
        missing = sorted({finding.check for finding in found if finding.level == "skip"})
        raise NotChecked(f"not ready: {', '.join(missing)} could not be checked; see above")
    print(f"ready: {len(found)} checks, {sum(finding.level == 'warn' for finding in found)} warnings")


if __name__ == "__main__":
    run_job(main)

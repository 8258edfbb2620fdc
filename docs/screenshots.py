"""Takes the pictures of docs/review.md: MLflow's pages of a run, in headless Chromium (Debian package ``chromium``).

python docs/screenshots.py RUN_NAME [FOLDER]: the newest run of that name in roo_ray's own store; PNGs go to FOLDER.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from mlflow.tracking import MlflowClient

from roo_ray.training.tracking import default_uri

WIDTH = 1500
PAGES = {  # name -> (path below the run's page, height)
    "overview": ("", 1150),
    "metrics": ("/model-metrics", 1500),
    "artifacts": ("/artifacts", 900),
    "system": ("/system-metrics", 1100),
}


def wait_for(url: str, seconds: float = 90) -> None:
    """Returns when something answers at the address."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            urlopen(url, timeout=2).close()
            return
        time.sleep(0.5)
    raise SystemExit(f"nothing answers at {url}")


def main(run_name: str, folder: Path) -> None:
    client = MlflowClient(default_uri())
    experiments = [e.experiment_id for e in client.search_experiments()]
    query = f"attributes.run_name = '{run_name}'"
    found = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"])
    if not found:
        raise SystemExit(f"no run '{run_name}' in {default_uri()}")
    run = found[0].info
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", default_uri()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(command, env=os.environ | quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        page = f"http://127.0.0.1:{port}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
        for name, (path, height) in PAGES.items():
            with tempfile.TemporaryDirectory() as profile:
                options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
                options += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{height}", "--timeout=60000"]
                options += ["--virtual-time-budget=25000", f"--screenshot={(folder / f'{name}.png').absolute()}"]
                subprocess.run(["chromium", *options, page + path], capture_output=True, check=False, timeout=180)
            print(folder / f"{name}.png")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images"))

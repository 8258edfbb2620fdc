"""Takes the pictures of docs/review.md: MLflow's pages of a run, in headless Chromium (Debian package ``chromium``).

python docs/screenshots.py RUN_NAME [FOLDER]: the newest run of that name in roo_ray's own store; PNGs go to FOLDER.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
from mlflow.tracking import MlflowClient
from PIL import Image

from roo_ray.source_config import home
from roo_ray.training.tracking import default_uri

WIDTH = 1400
PAGES = {  # name -> (path below the run's page, height, words in the box that searches charts)
    "overview": ("", 1150, ""),
    "metrics": ("/model-metrics", 1100, "train"),
    "artifacts": ("/artifacts/review/{picture}", 800, ""),
    "system": ("/system-metrics", 900, ""),
}
SECONDS_TO_DRAW = 12.0
# closes the panel beside the page, hides the charts' tools and where this machine keeps its data, searches the charts
PREPARE = """
document.head.insertAdjacentHTML('beforeend', '<style>.modebar {display: none !important}</style>');
for (const b of document.querySelectorAll('[aria-label="Close"], [aria-label="Close assistant"]')) b.click();
for (const h of document.querySelectorAll('span, h1, h2, h3, h4'))
  if (h.textContent.trim() === 'MLflow Assistant') {
    let p = h;
    while (p && p.querySelectorAll('button').length < 3) p = p.parentElement;
    const all = p ? p.querySelectorAll('button') : [];
    if (all.length) all[2].click();
    break;
  }
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) walk.currentNode.data = walk.currentNode.data.replaceAll(HOME, '~/.roo_ray');
const box = document.querySelector('input[placeholder="Search metric charts"]');
if (box && WORDS) {
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, WORDS);
  box.dispatchEvent(new Event('input', {bubbles: true}));
}
"""


async def photograph(pages: dict[Path, tuple[str, int, str]]) -> None:
    """Opens each (address, height, words) in one Chromium, by its debugging protocol, and writes the pictures."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
        browser = subprocess.Popen(
            ["chromium", *options, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            told = Path(profile) / "DevToolsActivePort"
            while not told.is_file() or not told.read_text():
                await asyncio.sleep(0.2)
            debugger = f"http://127.0.0.1:{told.read_text().split()[0]}/json"
            async with aiohttp.ClientSession() as session:
                async with session.get(debugger) as answer:
                    tab = next(t for t in await answer.json() if t["type"] == "page")
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket_:

                    async def call(method: str, **parameters: Any) -> Any:
                        await socket_.send_json({"id": 1, "method": method, "params": parameters})
                        while True:
                            message = await socket_.receive_json()
                            if message.get("id") == 1:
                                return message.get("result", {})

                    for path, (address, height, words) in pages.items():
                        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
                        await call("Emulation.setDeviceMetricsOverride", **size)
                        await call("Page.navigate", url="about:blank")
                        await call("Page.navigate", url=address)
                        await asyncio.sleep(SECONDS_TO_DRAW / 2)
                        names = f"const WORDS = {json.dumps(words)}, HOME = {json.dumps(str(home()))};"
                        await call("Runtime.evaluate", expression=names + PREPARE)
                        await asyncio.sleep(SECONDS_TO_DRAW / 2)
                        shot = await call("Page.captureScreenshot", format="png")
                        picture = Image.open(io.BytesIO(base64.b64decode(shot["data"])))
                        picture.convert("RGB").quantize(96).save(path, optimize=True)
                        print(path)
        finally:
            browser.terminate()
            browser.wait()


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
    pictures = sorted(Path(item.path).name for item in client.list_artifacts(run.run_id, "review"))
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
        picture = next(name for name in pictures if name.startswith("ne_over_steps"))
        asyncio.run(
            photograph(
                {
                    folder / f"{name}.png": (page + path.format(picture=picture), height, words)
                    for name, (path, height, words) in PAGES.items()
                }
            )
        )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images"))

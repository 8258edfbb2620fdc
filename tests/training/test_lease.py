"""One job at a time works on a run; one that was killed holds nobody up for long."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from roo_ray.errors import ConfigError
from roo_ray.training import lease
from roo_ray.training.lease import FOLDER, at_work


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 0.6)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)


def sign(folder: Path, **content: object) -> Path:
    path = folder / FOLDER / "other"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "processes": 1, "pid": 1, "started": 1.0, "count": 0} | content))
    return path


def test_a_second_job_is_refused_and_the_next_one_is_not(tmp_path: Path) -> None:
    for _ in range(2):
        with at_work(str(tmp_path), "run 'a'", print):
            with (
                pytest.raises(ConfigError, match="another job is at work on run 'a': process"),
                at_work(str(tmp_path), "run 'a'", print),
            ):
                pass
            assert len(list((tmp_path / FOLDER).iterdir())) == 1  # the first one's sign stays
        assert not (tmp_path / FOLDER).exists()


def test_a_job_on_another_machine_is_known_by_its_count(tmp_path: Path) -> None:
    ended = threading.Event()

    def work() -> None:
        for count in range(1000):
            sign(tmp_path, count=count)
            if ended.wait(0.1):
                return

    thread = threading.Thread(target=work)
    thread.start()
    said: list[str] = []
    try:
        time.sleep(0.05)
        with (
            pytest.raises(ConfigError, match="on elsewhere"),
            at_work(str(tmp_path), "run 'a'", said.append),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert "is it still at it?" in said[0]
    begin = time.perf_counter()
    with at_work(str(tmp_path), "run 'a'", said.append):  # it gives no sign any more
        assert time.perf_counter() - begin > 0.5
        assert not (tmp_path / FOLDER / "other").exists()


def test_a_killed_process_of_this_machine_is_known_at_once(tmp_path: Path) -> None:
    lines = ("import os", "from roo_ray.training.lease import at_work", f"with at_work({str(tmp_path)!r}, 'a', print):")
    code = "\n".join([*lines, "    os._exit(9)"])
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    said: list[str] = []
    with at_work(str(tmp_path), "run 'a'", said.append):
        pass
    assert said == []

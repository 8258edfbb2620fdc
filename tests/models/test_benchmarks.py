"""The benchmarks of models run, with sizes and precision as on a GPU, and say what their docs say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZE = ["--bf16", "--dim", "16", "--heads", "4", "--layers", "3", "--peak-tflops", "0.1"]


def run(script: str, *arguments: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The lines printed, and the rows written to the ``--json`` file, which comes last."""
    command = [sys.executable, str(BENCHMARKS / script), *SIZE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), json.loads(Path(arguments[-1]).read_text())["rows"]


def share(cell: str) -> float:
    return float(cell.strip(" |%")) / 100


def test_attention_in_bfloat16(tmp_path: Path) -> None:
    lines, rows = run("attention.py", "--quick", "--longest", "30", "--sequences", "5", "--json", str(tmp_path / "a"))
    assert [(row["history"], row["sequences"]) for row in rows] == [(30, 5)]
    assert share(lines[2].split("|")[-2]) == pytest.approx(rows[0]["ours_tflops"] / 0.1, abs=0.001)


def test_train_step_has_absolute_figures(tmp_path: Path) -> None:
    cases = ["--kinds", "hstu", "--history", "20", "--impressions", "4", "--batch", "8", "--rounds", "1"]
    lines, (row,) = run("train_step.py", *cases, "--json", str(tmp_path / "a"))
    names, cells = ([cell.strip() for cell in lines[place].strip("|").split("|")] for place in (0, 2))
    printed = dict(zip(names, cells, strict=True))
    assert float(printed["ROO ms"]) == pytest.approx(row["request_ms"], abs=0.1)
    assert float(printed["impression-level ms"]) == pytest.approx(row["impression_ms"], abs=0.1)
    assert float(printed["ROO MB kept"]) == pytest.approx(row["request_mb"], abs=0.1)
    assert float(printed["ROO all-to-all MB"]) == pytest.approx(row["all_to_all_mb"], abs=0.01)
    assert share(printed["MFU"]) == pytest.approx(row["request_gflop"] / row["request_ms"] / 0.1, abs=0.001)

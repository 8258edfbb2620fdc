"""Memory on CPU, each case in a process of its own: torch and glibc look once."""

import subprocess
import sys
from pathlib import Path

import pytest

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_MB = """
import re
import torch
from roo_ray.allocator import keep_freed_memory
import roo_ray.training.worker  # asks for huge pages, and imports TorchRec, which makes a tensor
keep_freed_memory()
kept = torch.ones(16 << 20)  # 64 MB
print(int(re.search(r"AnonHugePages: +(\\d+) kB", open("/proc/self/smaps_rollup").read())[1]) // 1024)
"""


@pytest.mark.skipif(
    not MODE.exists() or "[madvise]" not in MODE.read_text(), reason="huge pages are not given to whom asks here"
)
@pytest.mark.parametrize(("asked", "least", "most"), [(None, 32, 128), ("0", 0, 16)])
def test_a_trainer_s_large_tensors_lie_on_huge_pages(
    asked: str | None, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if asked is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", asked)
    done = subprocess.run([sys.executable, "-c", HUGE_MB], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most

#!/usr/bin/env bash
# Makes the virtual environment. On a machine without an NVIDIA GPU: the CPU build of FBGEMM under the name
# that TorchRec asks for, and no CUDA packages. On a machine with one: the CUDA builds.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3.11}"
venv="${VENV:-.venv}"

command -v "$python" >/dev/null || { echo "error: $python not found; set PYTHON=... to a Python 3.10-3.12" >&2; exit 2; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"

$pip install --quiet --upgrade pip  # older ones download all wheels in a dry run

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  echo "roo_ray: NVIDIA GPU found, installing the CUDA builds"
  $pip install --quiet -e ".[gpu,dev]"
else
  echo "roo_ray: no NVIDIA GPU found, installing the CPU builds"
  if [ -z "${ALLOW_CUDA:-}" ]; then
    report="$($pip install --quiet --dry-run --ignore-installed --report - torch==2.13.0)"
    if grep -q '"name": "nvidia-' <<<"$report"; then
      cat >&2 <<'EOF'
error: on this machine pip resolves torch to its CUDA build (several GB), and there is no NVIDIA GPU.
Point pip at PyTorch's CPU wheels and run make again; the address is on pytorch.org under "Get Started",
choose Linux / Pip / CPU:
    export PIP_EXTRA_INDEX_URL=<that address>
or take the CUDA build all the same: ALLOW_CUDA=1 make ...
EOF
      exit 2
    fi
  fi
  $pip install --quiet ./packaging/fbgemm-gpu-stub
  $pip install --quiet -e ".[torchrec,dev]"
fi
echo "roo_ray: environment ready in $venv"

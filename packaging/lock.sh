#!/usr/bin/env bash
# Writes the lock files of the images: every distribution pinned, with the hashes of its files.
#   pip install uv && bash packaging/lock.sh            what is pinned stays, where it fits; UPGRADE=1 takes the newest
# For cluster/requirements-cpu.txt uv must find PyTorch's CPU wheels first (UV_INDEX=... or UV_FIND_LINKS=...).
set -euo pipefail
cd "$(dirname "$0")/.."
out="$(mktemp -d)"
UV=uv
trap 'rm -rf "$out"' EXIT
echo "fbgemm-gpu @ file://$PWD/packaging/fbgemm-gpu-stub" > "$out/stub.txt"

lock() {  # NAME, the command line's further arguments of uv
  local name="$1"; shift
  [[ -n "${UPGRADE:-}" ]] || cp "cluster/requirements-$name.txt" "$out/$name.txt"
  $UV pip compile --quiet --python-version 3.11 --generate-hashes --no-header --no-annotate "$@" -o "$out/$name.txt"
  {
    echo "# Made by packaging/lock.sh for Python 3.11 on x86-64 Linux; install with --no-deps --require-hashes."
    grep -v '^fbgemm-gpu @' "$out/$name.txt"
  } > "cluster/requirements-$name.txt"
}

lock cpu pyproject.toml --extra torchrec cluster/extra-cloud.in --override "$out/stub.txt"
UV="env -u UV_FIND_LINKS -u UV_INDEX uv" lock gpu pyproject.toml --extra gpu cluster/extra-cloud.in --python-platform x86_64-manylinux_2_28
lock mlflow cluster/mlflow/requirements.in
{
  echo "# Made by packaging/lock.sh: what builds the in-repo distributions; install with --no-deps --require-hashes."
  awk '/^[a-zA-Z]/ { ours = /^setuptools==/ } ours' cluster/requirements-cpu.txt
} > cluster/requirements-build.txt

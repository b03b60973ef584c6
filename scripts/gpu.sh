#!/usr/bin/env bash
# A first run on a machine with an NVIDIA GPU: see `scripts/gpu.sh --help`, and docs/gpu.md. PYTHON is an interpreter with torch,
# triton and pytest; nothing is downloaded and nothing installed. Results go to $OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"

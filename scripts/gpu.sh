#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, test, compute-sanitizer, benchmark; results under benchmarks/results/<gpu>/ (or $OUT).
# PYTHON is an interpreter with torch, triton and pytest; nothing is downloaded. Goes on after a failed part and says so at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
name=$("$PYTHON" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || exit 1
out=${OUT:-benchmarks/results/$name}
mkdir -p "$out"
failed=()
part() {
  local title=$1 started=$SECONDS
  shift
  echo "== $title"
  "$@" >"$out/$title.log" 2>&1 || failed+=("$title")
  tail -n 6 "$out/$title.log"
  echo "== $title: $((SECONDS - started)) s"
}

arch=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} KINETO_LOG_LEVEL=6
part build timeout 150 "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --editable .
part explain "$PYTHON" -c 'import torch, sfm_fast; print(sfm_fast.explain(torch.zeros(2, 1, device="cuda")))'
part test timeout 240 "$PYTHON" -m pytest -q --maxfail=20 tests/test_gpu.py tests/test_gpu_step.py
for tool in memcheck racecheck; do
  part "$tool" timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 0 \
    "$PYTHON" -m pytest -q -x tests/test_gpu.py \
    -k "cuda and ((accurate and float32 and (odd or labelled)) or (size and 500) or decoupled or images)"
done
for preset in imagenet-100 imagenet-1k; do
  part "$preset" timeout 130 "$PYTHON" -m sfm_fast.cli.main bench --preset "$preset" --device cuda --out "$out"
  [ -f "$out/$preset.md" ] && cat "$out/$preset.md"
done
part claims timeout 120 "$PYTHON" -m pytest -q -s -m "claims and not slow" benchmarks/claims.py
echo "failed parts: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]

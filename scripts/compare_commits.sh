#!/usr/bin/env bash
# What got worse since a commit: BASE and the working tree as it stands, built and measured one after the other on this machine.
#
#   scripts/compare_commits.sh BASE [options of `sfm-fast bench`]      # default: --preset small --device cpu
#
# First the gate of tests/gate with the committed baseline, then both results side by side. Times are compared as ratios within each
# run. Exit code: 0 where nothing got worse, 1 on a regression, 2 where nothing could be compared. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${1:?"usage: scripts/compare_commits.sh BASE [options of sfm-fast bench]"}
shift
[ $# -gt 0 ] || set -- --preset small --device cpu
python=$(command -v "${PYTHON:-python3}")
[[ $python = /* ]] || python=$PWD/$python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} SFM_FAST_BUILD=${SFM_FAST_BUILD:-cpu}

folder=$(mktemp -d)
trap 'git worktree remove --force "$folder/sources" 2>/dev/null || true; rm -rf "$folder"' EXIT
git worktree add --quiet --detach "$folder/sources" "$base"

measure() { # SOURCES NAME OPTIONS: install them into a folder of their own, which PYTHONPATH puts before any other installation
  "$python" -m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check --target "$folder/$2" "$1"
  (cd "$folder" && PYTHONPATH="$folder/$2" "$python" -P -m sfm_fast.benchmarks "${@:3}" --out "$folder/result-$2")
}

worse=0
"$python" -m pytest -q tests/gate/test_budgets.py || worse=1
measure "$folder/sources" base "$@"
measure "$PWD" head "$@"
cd "$folder"
code=0
for result in result-head/*.json; do
  PYTHONPATH="$folder/head" "$python" -P -m sfm_fast.benchmarks compare "result-base/${result##*/}" "$result" || code=$?
done
[ "$code" -gt 0 ] || code=$worse
exit "$code"

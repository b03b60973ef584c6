"""Run tests/gpu/smoke.cu's program and compare what it prints with its reference, which the CPU shim made.

    python benchmarks/gpu/smoke.py --prepared .gpu --work FOLDER

Without a prepared program it is built into FOLDER: by nvcc where nvidia-smi sees a card, else by g++ for the CPU, whose reference is
then its own result with threads and blocks in the other order.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.gpu import card  # noqa: E402

SOURCE = ROOT / "tests" / "gpu" / "smoke.cu"
# Relative to the norm of a result: float32 sums in another order, and TF32 products, whose operands round to 2^-11.
TOLERANCE, TF32 = 2e-4, 5e-3


def differences(printed: str, reference: str) -> list[str]:
    """The differences between two outputs, one line each: names, errors, non-finite values, sums beyond the tolerance."""
    ours, theirs = ([line for line in text.splitlines() if " error " in line] for text in (printed, reference))
    problems = [] if len(ours) == len(theirs) else [f"{len(ours)} results instead of {len(theirs)}"]
    for one, two in zip(ours, theirs, strict=False):
        if problem := _difference(one, two):
            problems.append(problem)
    return problems


def _difference(one: str, two: str) -> str:
    (head, *numbers), (other_head, *others) = _parts(one), _parts(two)
    if head.split(" error ")[0] != other_head.split(" error ")[0]:
        return f"{head} instead of {other_head}"
    if head != other_head:
        return f"{head}, wanted {other_head}"
    tolerance = TF32 if head.split()[1] == "high" else TOLERANCE
    scale = max(1.0, math.fabs(others[1]))
    worst = max(math.fabs(a - b) for a, b in zip(numbers, others, strict=True))
    # Sums and weighted sums of n values differ by more than their norm, but by at most sqrt(n) times as much.
    return "" if worst <= 30 * tolerance * scale else f"{head}: {numbers} instead of {others}"


def _parts(line: str) -> tuple[str, float, float, float]:
    head, total, norm, weighted = line.rsplit(maxsplit=3)
    return head, float(total), float(norm), float(weighted)


def build(folder: Path, cpu: bool) -> Path:
    program = folder / ("smoke_cpu" if cpu else "smoke")
    if cpu:
        shim = ["-x", "c++", "-DSFM_SHIM", f"-I{ROOT / 'tests' / 'shim'}"]
        command = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", *shim, str(SOURCE), "-o", str(program)]
    else:
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        command = [
            nvcc,
            "-std=c++17",
            "-gencode=arch=compute_90,code=sm_90",
            "-O3",
            "-lineinfo",
            str(SOURCE),
            "-o",
            str(program),
        ]
    subprocess.run(command, check=True)
    return program


def output_of(program: Path, *words: str, log: Path) -> str:
    """The program's output, written to ``log`` line by line: a kernel that hangs is the one after the last line."""
    with log.open("w") as file:
        done = subprocess.run([str(program), *words], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode not in (0, 1):  # 1: some result has an error or a bad value, which the output names
        print(f"== {program.name} ended with {done.returncode}")
    return log.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    prepared, kept = options.prepared / "smoke", options.prepared / "smoke.txt"
    log = options.work / "smoke_output.log"
    if card.name():
        program = prepared if prepared.exists() else build(options.work, cpu=False)
        target = options.work / "smoke"  # for the sanitizers and the profiler
        if program != target:
            shutil.copy(program, target)
            target.chmod(0o755)
        printed = output_of(target, log=log)
        reference = kept.read_text() if kept.exists() else ""
    else:
        program = build(options.work, cpu=True)
        printed = output_of(program, log=log)
        reference = output_of(program, "--reversed", log=options.work / "smoke_reversed.log")
    count = printed.count(" error ")
    problems = differences(printed, reference) if reference else ["no reference: run `make gpu-prepare`"]
    if "failures 0" not in printed:
        problems.append(printed.splitlines()[-1] if printed else "no output")
    for problem in problems[:12]:
        print("==", problem)
    print(f"== {count} results, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The run on a GPU that `scripts/gpu.sh` starts: its stages, in the order of their value, and the files it leaves.

    scripts/gpu.sh              tests, times, sanitizer and profiles of the kernels: at most 420 s
    scripts/gpu.sh --second     whole steps of SFM and of LGM: at most 200 s
    scripts/gpu.sh --dry-run    both with small shapes on a CPU: for typing errors: minutes; its limits only end what hangs

Results go to $OUT (default: a folder in benchmarks/results, named after the card), at most six files: summary.txt, bench.json, tests.log,
sanitizer.log, ncu.txt and all.tgz; of --second steps.txt, steps.json and steps.tgz. `benchmarks/gpu/results.py` makes of them what is
committed. What `make gpu-prepare` built is taken from the folder .gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.gpu import card  # noqa: E402
from benchmarks.gpu.stages import PlanError, Stage, Summary, python, run  # noqa: E402

FIRST, SECOND, DRY = 420.0, 200.0, 1800.0  # seconds, at most
FILES = ("summary.txt", "bench.json", "tests.log", "sanitizer.log", "ncu.txt", "all.tgz")
FILES_OF_SECOND = ("steps.txt", "steps.json", "steps.tgz")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PREPARED = ROOT / ".gpu"
# Kernels whose counters are read.
PROFILED = "pair_gram|pair_update|flow_sums|render_strips|augment_gradient"


class Plan:
    """The stages of one run, and their folders. dry: on a CPU. work: a folder for logs that only go into all.tgz."""

    def __init__(self, out: Path, work: Path, dry: bool) -> None:
        self.out, self.work, self.dry = out, work, dry
        self.site = work / "site"
        self.environment = {
            "PYTHONPATH": str(self.site),
            "PYTHONUNBUFFERED": "1",
            "KINETO_LOG_LEVEL": "6",
            "SFM_FAST_EXPECTED": str(PREPARED / "expected"),
            "SFM_FAST_DRY_RUN": "1" if dry else "0",
            "SFM_FAST_COMMIT": prepared_commit(),
            "TRITON_CACHE_DIR": str(work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            # The folder of the toolkit's programs if they are not on the path.
            "PATH": f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin",
        }
        if dry:
            self.environment |= {
                "SFM_FAST_LIBRARIES": str(
                    work / "libraries"
                ),  # the CUDA kernels on CPU tensors, see tests/shim/library.py
                "TRITON_INTERPRET": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            }

    def stage(self, name: str, limit: float, command: list[str], log: str = "", more: float = 0) -> Stage:
        return Stage(
            name, limit, command, log or str(self.work / f"{name}.log"), environment=self.environment, more=more
        )

    def script(self, name: str, *words: str) -> list[str]:
        """A script of this folder that needs nothing installed."""
        return python(str(HERE / name), *words)

    def install(self, limit: float, build_limit: float) -> list[Stage]:
        words = ("--site", str(self.site), "--prepared", str(PREPARED), *(["--dry-run"] if self.dry else []))
        missing = self.work / "site" / "BUILD"
        build = self.stage("build", build_limit, self.script("install.py", *words, "--build"))
        return [
            self.stage("install", limit, self.script("install.py", *words)),
            replace(build, needed=missing.exists),
        ]

    def tests(self, name: str, limit: float, *words: str, more: float = 0) -> Stage:
        options = ["-q", "--tb=short", "-rfE", "-p", "no:cacheprovider", "--maxfail=200"]
        if has_module("pytest_timeout"):
            options += ["--timeout", "90"]
        # -P: otherwise the checkout is first on the path, where kernels/ and benchmarks/ are not parts of the package.
        command = python("-P", "-m", "pytest", *options, *words)
        # pytest needs time to end its workers and to print the failures.
        return replace(self.stage(name, limit, command, "tests.log", more), grace=12.0)

    def first(self) -> list[Stage]:
        smoke = ("--prepared", str(PREPARED), "--work", str(self.work))
        device = "cpu" if self.dry else "cuda"
        stages = [self.stage("card", 8, self.script("card.py")), *self.install(20, 70)]
        stages.append(self.stage("smoke", 15, self.script("smoke.py", *smoke)))
        times = python(
            "-P", "-m", "sfm_fast.benchmarks.gpu.times", "--device", device, "--out", str(self.out / "bench.json")
        )
        stages.append(self.stage("times", 95, [*times, "--seconds", "80"]))
        workers = ["-n", "12"] if has_module("xdist") else []
        stages.append(
            self.tests(
                "correctness",
                105,
                "tests/gpu/test_gpu.py",
                "tests/gpu/test_gpu_images.py",
                "-m",
                "gpu_quick",
                *workers,
                more=60,
            )
        )
        stages.append(self.tests("alone", 30, "tests/gpu", "-m", "gpu_alone", more=15))
        program = str(self.work / "smoke")
        for tool in TOOLS:
            command = [
                "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "1",
                "--launch-timeout",
                "0",
                program,
            ]
            stages.append(self.stage(tool, 11, command, "sanitizer.log", more=15))
        profile = [
            "ncu", "--clock-control", "none", "--section", "SpeedOfLight", "--section", "Occupancy", "--section", "MemoryWorkloadAnalysis",
            "--kernel-name", f"regex:{PROFILED}", "--launch-count", "8", program, "--profile",
        ]  # fmt: skip
        stages.append(self.stage("ncu", 28, profile, "ncu.txt", more=20))
        return self.rehearsed(stages) if self.dry else stages

    def second(self) -> list[Stage]:
        device = "cpu" if self.dry else "cuda"
        steps = python(
            "-P", "-m", "sfm_fast.benchmarks.gpu.steps", "--device", device, "--out", str(self.out / "steps.json")
        )
        presets = ("small", "small") if self.dry else ("imagenet-100", "imagenet-1k")
        limits, seconds = ((150, 150), (26, 11)) if self.dry else ((95, 75), (81, 61))
        stages = self.install(12, 10)[:1]
        for number, (preset, limit, most) in enumerate(zip(presets, limits, seconds, strict=True)):
            name = f"steps-{preset}" if not self.dry else f"steps-{number}"
            words = ["--preset", preset, "--seconds", str(most), "--predicted", str(PREPARED / "predicted.json")]
            stages.append(self.stage(name, limit, [*steps, *words]))
        return stages

    def rehearsed(self, stages: list[Stage]) -> list[Stage]:
        """The same stages for a CPU: with limits for a slow and busy machine, and the profilers' commands printed, not run."""
        limits = {"card": 30, "install": 60, "build": 450, "smoke": 300, "times": 120, "correctness": 400, "alone": 60}
        smaller = []
        for stage in stages:
            command, limit = list(stage.command), limits.get(stage.name, stage.limit)
            if stage.name == "correctness":
                where = command.index("-n") if "-n" in command else len(command)
                command[where : where + 2] = ["-n", "2"] if where < len(command) else []
                few = "triton and (tiny or decoupled or hard)"  # an interpreted kernel takes seconds
                command += ["-k", f"(cpu and not many-classes) or ({few})"]
            if stage.name == "times":
                command[-1] = "33"
            if stage.name in TOOLS or stage.name == "ncu":
                command = python("-c", f"print('== a GPU machine would run: {' '.join(command)[:60]}...')")
                limit = 15
            smaller.append(replace(stage, command=command, limit=limit))
        return smaller


def prepared_commit() -> str:
    """The commit of `make gpu-prepare`, for a copy of the tree without git."""
    try:
        return str(json.loads((PREPARED / "contents.json").read_text()).get("commit") or "")
    except (OSError, ValueError):
        return ""


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def pack(target: Path, work: Path, names: tuple[str, ...]) -> None:
    """Pack every log of the run and its results ``names`` into ``target``, atomically."""
    beside = target.with_name(f".{target.name}")
    with tarfile.open(beside, "w:gz") as archive:
        for path in sorted([*work.glob("*.log"), *(target.parent / name for name in names)]):
            if path.is_file() and path.suffix != ".tgz" and path.stat().st_size < 8 << 20:
                archive.add(path, arcname=path.name)
    beside.rename(target)


def clear(out: Path, names: tuple[str, ...]) -> None:
    """Remove an earlier run's files of these names, since logs are appended to."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        (out / name).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--second", action="store_true", help="whole steps instead of kernels")
    parser.add_argument("--dry-run", action="store_true", help="both runs on a CPU, small")
    parser.add_argument("--plan", action="store_true", help="print the stages with their limits, and run nothing")
    options = parser.parse_args()
    default = (
        ROOT / "benchmarks" / "results" / ("dry-run" if options.dry_run else card.folder_name(card.name()) or "gpu")
    )
    out = Path(os.environ.get("OUT") or default).resolve()
    names = FILES_OF_SECOND if options.second else FILES
    most = DRY if options.dry_run else SECOND if options.second else FIRST
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(out, Path(folder), options.dry_run)
        stages = plan.second() if options.second else plan.first()
        if options.dry_run and not options.second:
            stages += plan.second()[1:]
        if options.plan:
            print(*(f"{stage.limit:6g} s  {stage.name}: {' '.join(stage.command)}" for stage in stages), sep="\n")
            print(f"{sum(stage.limit for stage in stages):6g} s of at most {most:g} s")
            return 0
        clear(out, (*names, *(FILES_OF_SECOND if options.dry_run else ())))
        summary = Summary(out / names[0])
        try:
            failed = run(stages, out, summary, most=most, root=ROOT)
        except PlanError as error:
            summary.say(f"error: {error}")
            return 2
        summary.say(f"failed stages: {', '.join(failed) or 'none'}")
        pack(out / names[-1], Path(folder), names)
        print(f"results in {out}: {', '.join(name for name in names if (out / name).exists())}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

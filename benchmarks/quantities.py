"""What a build needs and does, in numbers that the same machine always finds again: bytes, operations, instructions, registers."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sfm_fast.errors import InputError
from sfm_fast.files import write_json
from sfm_fast.gate import callgrind

from . import worker
from .compare import NOT_COMPARED, UNCHANGED, Change, Limits, judge, judge_all
from .compare_build import Build
from .compare_client import Client, WorkerError, environment

Numbers = dict[str, float | str]  # a text says why there is no number
# Of a compiled kernel: what may be more, and what more of is better. A register or two come and go.
KERNEL_SLACK = {"registers": 2, "spills": 0, "shared": 0}
KERNEL_GAINS = ("loads128", "tensor_core")
_TABLE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import compile_cuda, table
cuda = table.cuda_rows() if compile_cuda.find_nvcc() else []
print(json.dumps({"versions": table.versions(), "triton": table.triton_rows(), "cuda": cuda}))
"""


def memory_and_operations(build: Build, kinds: Sequence[str], *, device: str) -> dict[str, Numbers]:
    """Peak bytes of every operation's forward and backward, and of predicted steps; these steps' operations."""
    found: dict[str, Numbers] = {"bytes": {}, "flops": {}}
    # One thread: workspaces of threads would make the numbers those of one machine.
    with Client(build.folder, device=device, threads=1) as client:
        for case in worker.BYTES if "bytes" in kinds else ():
            try:
                found["bytes"][case] = client.ask("bytes", case=case)["bytes"]
            except WorkerError as error:
                found["bytes"][case] = str(error)
        for case in worker.STEPS:
            name = f"predicted step, {case}"
            try:
                predicted = client.ask("predict", case=case)
                found["bytes"][name], found["flops"][name] = predicted["peak_bytes"], predicted["flops"]
            except WorkerError as error:
                found["bytes"][name] = found["flops"][name] = str(error)
    return {kind: numbers for kind, numbers in found.items() if kind in kinds}


def instructions(build: Build) -> Numbers:
    """Instructions inside the C++ library, of every operation at small shapes, on one thread; kept beside the build."""
    if "_C" not in {name.partition(".")[0] for name in build.library_bytes}:
        return dict.fromkeys(worker.INSTRUCTIONS, "has no C++ library")
    instruments = [Path(str(module.__file__)).read_bytes() for module in (worker, callgrind)]
    kept = build.folder / f"instructions-{hashlib.sha256(b''.join(instruments)).hexdigest()[:16]}.json"
    if not kept.exists():
        counted = _count_instructions(build)
        if any(isinstance(value, str) for value in counted.values()):  # what failed may have failed by chance
            return counted
        write_json(kept, counted)
    numbers: Numbers = json.loads(kept.read_text())
    return numbers


def _count_instructions(build: Build) -> Numbers:
    found: Numbers = {}
    with Client(build.folder, device="cpu", threads=1) as client, tempfile.TemporaryDirectory() as folder:
        for case in worker.INSTRUCTIONS:  # what a tree lacks would end the count of all
            try:
                client.ask("prepare", case=case, path=f"{folder}/result")
            except WorkerError as error:
                found[case] = str(error)
    able = [case for case in worker.INSTRUCTIONS if case not in found]
    setup = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('worker', {str(worker.__file__)!r})\n"
        "worker = sys.modules['worker'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(worker)\n"
        f"worker.use_tree({str(build.folder)!r})\n"
        f"calls = worker.make_all({able!r})\n"
    )
    try:
        counted = callgrind.count_instructions(
            setup,
            {case: f"calls[{case!r}]()" for case in able},
            environment=environment(build.folder, 1),
            library="sfm_fast/_C",
        )
    except InputError as error:
        counted = dict.fromkeys(able, str(error).splitlines()[-1])
    return found | counted


def why_no_instructions() -> str:
    """Why instructions can't be counted on this machine, or ""."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    return ""


def kernel_table(build: Build, compile_now: bool) -> dict[str, Any]:
    """The committed table of compiled kernels; or the build's sources compiled now, which takes minutes once."""
    static = build.folder / "tests" / "static"
    if not (static / "table.json").exists():
        return {"versions": {}}
    if not compile_now:
        table: dict[str, Any] = json.loads((static / "table.json").read_text())
        return table
    kept = build.folder / "kernels.json"
    if not kept.exists():
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TABLE, str(static)],
            capture_output=True,
            text=True,
            env=environment(build.folder, 1),
        )
        if done.returncode:
            log = "\n".join(done.stderr.strip().splitlines()[-10:])
            raise InputError(f"{build.revision.name}: its kernels can't be compiled:\n{log}")
        write_json(kept, json.loads(done.stdout.splitlines()[-1]))
    table = json.loads(kept.read_text())
    return table


def compare_kernels(base: dict[str, Any], head: dict[str, Any], limits: Limits) -> list[Change]:
    """Two tables of compiled kernels. Rows of another compiler's are not compared, but for spills."""
    found = []
    for source, compiler in (("triton", "triton"), ("cuda", "nvcc")):
        before, after = (
            {f"{row['kernel']} {row['arch']}": row for row in part.get(source, [])} for part in (base, head)
        )
        versions = [part["versions"].get(compiler) for part in (base, head)]
        fields = [*KERNEL_SLACK, *KERNEL_GAINS] if versions[0] == versions[1] else ["spills"]
        if before and after and versions[0] != versions[1]:
            note = f"compiled by {versions[0]} and {versions[1]}: only spills are compared"
            found.append(Change("kernels", f"{source}: registers, shared memory", None, None, NOT_COMPARED, note=note))
        for field in fields:
            old, new = (
                {f"{source}: {name}, {field}": row[field] for name, row in part.items()} for part in (before, after)
            )
            slack = KERNEL_SLACK.get(field, 0)
            found += judge_all("kernels", old, new, limits, slack=slack, more_is_worse=field in KERNEL_SLACK)
    return found


def compare_quantities(
    base: Build,
    head: Build,
    limits: Limits,
    kinds: Sequence[str],
    *,
    device: str,
    compile_kernels: bool,
    say: Callable[[str], None],
) -> list[Change]:
    """All of the above that ``kinds`` names, of both builds."""
    found: list[Change] = []
    if "bytes" in kinds or "flops" in kinds:
        say("peak memory and operations")
        before, after = (memory_and_operations(build, kinds, device=device) for build in (base, head))
        for kind in before:
            found += judge_all(kind, before[kind], after[kind], limits)
    if "instructions" in kinds and (why := why_no_instructions()):
        say(f"instructions: not counted: {why}")
        found.append(Change("instructions", "all", None, None, NOT_COMPARED, note=why))
    elif "instructions" in kinds:
        say("instructions")
        with ThreadPoolExecutor(2) as pool:  # nobody's load changes a count
            before, after = pool.map(instructions, (base, head))
        found += judge_all("instructions", before, after, limits)
    if "kernels" in kinds:
        say("compiled kernels")
        before, after = (kernel_table(build, compile_kernels) for build in (base, head))
        found += compare_kernels(before, after, limits)
    for name, size in head.library_bytes.items():  # to know, not to judge
        if name in base.library_bytes:
            change = judge("library", name, base.library_bytes[name], size, limits.tolerance)
            found.append(Change(**{**vars(change), "verdict": UNCHANGED, "limit": None}))
    return found

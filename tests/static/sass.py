"""What is inside a compiled NVIDIA kernel: registers, spills, shared memory, and counts of the instructions that matter.

Reads cubins, object files and shared libraries with the tools in triton's wheel, so no CUDA toolkit and no GPU are needed.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "OMMA")


def _run(tool: str, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{tool} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def kernels(path: str | Path, arch: str) -> dict[str, dict[str, Any]]:
    """Mangled kernel name -> registers, stack, shared, spill_ops, loads128, tensor_core, instructions, for one arch ("sm_90")."""
    found: dict[str, dict[str, Any]] = {}
    usage = _run("cuobjdump", "-res-usage", "-arch", arch, str(path))
    for name, text in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
        found[name] = {"registers": number["REG"], "stack": number["STACK"], "shared": number["SHARED"]}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    name = ""
    for line in _run("cuobjdump", "-sass", "-arch", arch, str(path)).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            name = match.group(1)
        elif name and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            counts[name][match.group(1)] += 1
    for name, row in found.items():
        by_base: collections.Counter[str] = collections.Counter()
        for instruction, count in counts[name].items():
            by_base[instruction.split(".")[0]] += count
        row["spill_ops"] = by_base["LDL"] + by_base["STL"]
        # 128-bit loads from global memory: straight to registers, by asynchronous copy to shared memory, or by a bulk copy.
        row["loads128"] = sum(
            count for key, count in counts[name].items() if key.startswith(("LDG", "LDGSTS")) and ".128" in key
        ) + sum(by_base[key] for key in ("UBLKCP", "UTMALDG"))
        row["tensor_core"] = sum(by_base[key] for key in TENSOR_CORE)
        row["instructions"] = sum(by_base.values())
    return found

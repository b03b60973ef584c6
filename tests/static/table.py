"""The committed table of what the compiled GPU kernels hold, and the comparison that keeps it from getting worse.

    python tests/static/table.py            # compare a fresh build with table.json
    python tests/static/table.py --update   # write table.json after a change that is meant

Needs nvcc for the CUDA rows and triton for the others, no GPU. Row: kernel, arch, registers, spills, shared (bytes), loads128
(128-bit loads from global memory), tensor_core (matrix instructions).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
TABLE = FOLDER / "table.json"
KEYS = ("registers", "spills", "shared", "loads128", "tensor_core")
# Two halves of about the same time, for two cores.
TRITON_TARGETS = (("sm_80", "sm_100"), ("sm_90", "gfx942"))

Row = dict[str, Any]


def _python(code: str, *arguments: str) -> list[Row]:
    """Rows printed by ``code`` in a process of its own: Triton compiles only where its interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def triton_rows() -> list[Row]:
    code = "import json, sys, compile_triton; print(json.dumps(compile_triton.rows(sys.argv[1:])))"
    with ThreadPoolExecutor(len(TRITON_TARGETS)) as pool:
        parts = list(pool.map(lambda targets: _python(code, *targets), TRITON_TARGETS))
    return _sorted(row for part in parts for row in part)


def cuda_rows() -> list[Row]:
    """From the built library where there is one (it has the production flags), else from a fresh compilation."""
    built = sorted(str(path) for path in (ROOT / "sfm_fast").glob("_C_cuda*.so"))
    rows = _python("import json, sys, compile_cuda; print(json.dumps(compile_cuda.rows(sys.argv[1:] or None)))", *built)
    return _sorted({**row, "spills": row["spill_ops"]} for row in rows)


def _sorted(rows: Any) -> list[Row]:
    kept = [{key: row[key] for key in ("kernel", "arch", *KEYS)} for row in rows]
    return sorted(kept, key=lambda row: (row["kernel"], row["arch"]))


def versions() -> dict[str, str | None]:
    """Of the compilers: numbers are compared only where they are the table's own."""
    import triton

    sys.path.insert(0, str(FOLDER))
    import compile_cuda

    nvcc = compile_cuda.find_nvcc()
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = next((line.split("release ")[1].split(",")[0] for line in text.splitlines() if "release " in line), None)
    return {"triton": triton.__version__, "nvcc": release}


def worse(rows: list[Row], committed: list[Row], same_compiler: bool) -> list[str]:
    """What got worse, in words. With another compiler only what must hold everywhere: no spills, tensor cores, wide loads."""
    found = []
    before = {(row["kernel"], row["arch"]): row for row in committed}
    now = {(row["kernel"], row["arch"]): row for row in rows}
    for key in before.keys() - now.keys():
        found.append(f"{key[0]} for {key[1]} is no longer compiled")
    for key, row in now.items():
        name = f"{key[0]} for {key[1]}"
        if row["spills"]:
            found.append(f"{name} spills ({row['spills']})")
        old = before.get(key)
        if old is None:
            found.append(f"{name} is not in the table")
            continue
        for kind in ("tensor_core", "loads128"):
            if (row[kind] < old[kind]) if same_compiler else (old[kind] and not row[kind]):
                found.append(f"{name}: {kind} {old[kind]} -> {row[kind]}")
        if same_compiler:
            for kind, slack in (("registers", 2), ("shared", 0)):
                if row[kind] > old[kind] + slack:
                    found.append(f"{name}: {kind} {old[kind]} -> {row[kind]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write table.json")
    if parser.parse_args().update:
        rows = {"versions": versions(), "triton": triton_rows(), "cuda": cuda_rows()}
        lines = [f' "versions": {json.dumps(rows["versions"])}']
        for name in ("triton", "cuda"):
            lines.append(f' "{name}": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows[name]) + "\n ]")
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    committed, here = json.loads(TABLE.read_text()), versions()
    problems = [
        *worse(triton_rows(), committed["triton"], here["triton"] == committed["versions"]["triton"]),
        *worse(cuda_rows(), committed["cuda"], here["nvcc"] == committed["versions"]["nvcc"]),
    ]
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()

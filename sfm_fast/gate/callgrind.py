"""Counts the CPU instructions of Python statements with valgrind's callgrind, which doesn't depend on the load of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import InputError

# Valgrind's client requests are macros of inline assembly, so Python calls them through a small library.
_SHIM = """#include "callgrind.h"
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }
"""
_RUNNER = """import ctypes, gc, json, sys
shim = ctypes.CDLL(sys.argv[1])
work = json.load(open(sys.argv[2]))
names = {"__name__": "__main__"}
exec(compile(work["setup"], "<setup>", "exec"), names)
for name, source in work["statements"]:
    code = compile(source, f"<statement {name}>", "exec")
    exec(code, names)
    gc.collect()
    gc.disable()
    shim.start()
    exec(code, names)
    shim.stop()
    gc.enable()
"""


def count_instructions(
    setup: str,
    statements: Mapping[str, str],
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    library: str | None = None,
    pythonpath: Sequence[str] | None = None,
    timeout: float = 600.0,
) -> dict[str, int]:
    """Instructions of each statement in its second execution, in one process under callgrind, after ``setup`` and the statements before it.

    Args:
        setup: Python source, not counted.
        statements: name -> Python source; they share the variables of ``setup``.
        python: the interpreter. environment: variables to set in addition to this process's. pythonpath: folders put before PYTHONPATH.
        library: count only instructions inside this shared library (not those of functions it calls): the file's name or the end of
            its path up to the first dot, e.g. "_C" or "sfm_fast/_C". This count repeats exactly, because it includes none of Python's
            work; a count of all instructions varies by some tenths of a percent. None: all instructions.
        timeout: seconds for the whole process; only starting torch under valgrind takes about half a minute.

    Runs with one thread and a fixed hash seed. Valgrind supports AVX2 but not AVX-512, so code that detects the processor's features
    uses its AVX2 path.

    Raises ``InputError`` if valgrind or a C compiler is missing, the source fails, or ``library`` executed no instruction or isn't
    unique.
    """
    if not statements:
        raise InputError("statements must hold at least one statement, got none")
    for name, source in (("setup", setup), *statements.items()):
        try:
            compile(source, f"<{name}>", "exec")
        except (SyntaxError, ValueError) as error:
            raise InputError(f"{name}: not Python source ({error})") from error
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise InputError(
            "counting instructions needs valgrind, which isn't installed: apt install valgrind (or dnf, brew)"
        )
    with tempfile.TemporaryDirectory(prefix="sfm_fast_callgrind_") as name:
        folder = Path(name)
        shim = _build_shim(folder)
        (folder / "runner.py").write_text(_RUNNER, encoding="utf-8")
        _write_work(folder / "work.json", setup, statements)
        command = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / 'out'}"]
        command += [python, str(folder / "runner.py"), str(shim), str(folder / "work.json")]
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            **(environment or {}),
        }
        paths = [*(pythonpath or ()), variables.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"counting instructions took longer than timeout = {timeout:g} s") from error
        if done.returncode:
            raise InputError(f"the statements failed under valgrind: {done.stderr.strip()[-2000:]}")
        return {
            statement: _chosen(instructions((folder / f"out.{place}").read_text().splitlines()), library)
            for place, statement in enumerate(statements, 1)
        }


def instructions(lines: Iterable[str]) -> dict[str, int]:
    """Object file -> instructions executed in its own functions, from the lines of one callgrind profile.

    Format: Valgrind manual, "Callgrind Format Specification". Names are "ob=(1) /path" at first and "ob=(1)" later. The line
    after "calls=" has the callee's cost, which its own lines already include. Of the positions (absolute, "+n", "-n", "*") only
    their number before the costs matters.
    """
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}
    positions, column = 1, 0
    current, callee = "", False
    for line in lines:
        if line.startswith("positions:"):
            positions = len(line.split()) - 1
        elif line.startswith("events:"):
            column = line.split()[1:].index("Ir")
        elif line.startswith(("ob=", "cob=")):
            key, _, name = line.partition("=")[2].partition(" ")
            if not key.startswith("("):  # names written out in full
                key = name = line.partition("=")[2]
            if name:
                names[key] = name
            if line.startswith("ob="):
                current = names[key]
        elif line.startswith("calls="):
            callee = True
        elif line[:1].isdigit() or line[:1] in ("+", "-", "*"):
            costs = line.split()[positions:]
            if not callee and len(costs) > column:  # trailing zeros are omitted
                counts[current] += int(costs[column])
            callee = False
    return dict(counts)


def _chosen(counts: Mapping[str, int], library: str | None) -> int:
    if library is None:
        return sum(counts.values())
    wanted = "/" + library.removeprefix("/")
    matches = [path for path in counts if path.endswith(wanted) or _without_suffix(path).endswith(wanted)]
    if len(matches) != 1:
        seen = ", ".join(sorted(matches or counts))
        state = "names several libraries that ran" if matches else "ran no instruction"
        raise InputError(f"library {library!r} {state}: {seen}")
    return counts[matches[0]]


def _without_suffix(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _write_work(path: Path, setup: str, statements: Mapping[str, str]) -> None:
    import json

    path.write_text(json.dumps({"setup": setup, "statements": list(statements.items())}), encoding="utf-8")


def _build_shim(folder: Path) -> Path:
    """Compile the library that switches callgrind on and off, with valgrind's headers or those included in torch."""
    in_torch = Path(torch.__file__).parent / "utils" / "benchmark" / "utils" / "valgrind_wrapper"
    headers = [path for path in (Path("/usr/include/valgrind"), in_torch) if (path / "callgrind.h").exists()]
    if not headers:
        raise InputError("counting instructions needs callgrind.h, which isn't installed: apt install valgrind")
    compiler = next(
        (path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None
    )
    if compiler is None:
        raise InputError(
            "counting instructions needs a C compiler (cc, gcc or clang), which isn't installed: apt install gcc"
        )
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(_SHIM, encoding="utf-8")
    command = [compiler, "-O1", "-shared", "-fPIC", "-w", f"-I{headers[0]}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{compiler} can't build a small library: {done.stderr.strip()[-1000:]}")
    return library

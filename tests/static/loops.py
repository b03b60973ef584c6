"""Instructions of the hottest loop of each CUDA kernel, by kind: what a prediction of its time starts from.

    python tests/static/loops.py sfm_fast/_C_cuda.abi3.so sm_90 pair_

Hottest is the loop with the most tensor-core instructions, then the longest. A loop inside it is counted once, however often it runs.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import compile_cuda
import sass

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def loops(path: Path, arch: str) -> dict[str, collections.Counter[str]]:
    """Readable kernel name -> opcode -> count, of its hottest loop; kernels without one are left out."""
    code: dict[str, list[tuple[int, str, str]]] = collections.defaultdict(list)
    name = ""
    for line in sass._run("cuobjdump", "-sass", "-arch", arch, str(path)).splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            name = found.group(1)
        elif name and (found := INSTRUCTION.match(line)):
            code[name].append((int(found[1], 16), found[2].split(".")[0], found[3]))
    names = subprocess.run(["c++filt", *code], capture_output=True, text=True, check=True).stdout.splitlines()
    hottest = {}
    for readable, instructions in zip(map(compile_cuda.readable, names), code.values(), strict=True):
        every = [collections.Counter(body) for body in _bodies(instructions)]
        if every:
            hottest[readable] = max(every, key=lambda body: (body["HMMA"], sum(body.values())))
    return hottest


def _bodies(instructions: list[tuple[int, str, str]]) -> list[list[str]]:
    """The opcodes between each backward branch and its target."""
    found = []
    for at, opcode, words in instructions:
        target = re.search(r"0x([0-9a-f]+)", words) if opcode == "BRA" else None
        if target is not None and int(target[1], 16) < at:
            found.append([other for place, other, _ in instructions if int(target[1], 16) <= place <= at])
    return found


def main() -> None:
    path, arch, wanted = Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else ""
    for name, body in sorted(loops(path, arch).items()):
        if wanted in name:
            print(f"{name:36s} {sum(body.values()):5d}", *(f"{kind} {count}" for kind, count in body.most_common(9)))


if __name__ == "__main__":
    main()

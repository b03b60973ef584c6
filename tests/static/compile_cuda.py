"""What is inside the compiled CUDA kernels of ``csrc/cuda``, for each architecture; needs nvcc or a built library, no GPU.

``python tests/static/compile_cuda.py [library or object ...]`` prints the table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import sass

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
SHIM = ROOT / "tests" / "shim"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")
TYPES = {"float": "float32", "sfm::Bfloat16": "bfloat16", "sfm::Float16": "float16"}

# What a kernel's bool parameter says, false and true; of pairs, the precision.
SWITCHES = {"flow_sums": ("", "fused"), "flow_classes": ("", "anchored"), "render_images": ("", "quads")}

# Dynamic shared memory is chosen at the launch; a program prints what the launchers of the pair kernels ask for, and the
# backward of the rendering for RGB canvases of 256 and, with 4 columns a thread, 1024 pixels.
SIZES = """
#define SFM_SHIM
#include "pair_update.cuh"
#include "render_plan.cuh"
int strips(int canvas) {
  sfm::Sides sides{};
  for (int side = 1; side <= canvas; side *= 2) sides.side[sides.count++] = side;
  return sfm::StripPlan(sides, 3, canvas).shared;
}
int main() {
  std::printf("%d %d %d %d", sfm::PairTile<2>::SHARED, sfm::PairTile<4>::SHARED, sfm::GradientTile<2>::SHARED, sfm::GradientTile<4>::SHARED);
  std::printf(" %d %d %d %d", sfm::GramTile<2>::SHARED, sfm::GramTile<4>::SHARED, sfm::UpdateTile<2>::SHARED, sfm::UpdateTile<4>::SHARED);
  std::printf(" %d %d", strips(256), strips(1024));
}
"""


def find_nvcc() -> str | None:
    """The nvcc on the path or in the usual place, or None."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def compile_objects(folder: Path, architectures: Iterable[str] = ARCHITECTURES) -> list[Path]:
    """nvcc on every .cu file, all architectures in one object each."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc not found: give a built library instead")
    codes = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in architectures]
    objects = []
    for source in sorted(SOURCES.glob("*.cu")):
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([nvcc, *FLAGS, *codes, "-c", str(source), "-o", str(objects[-1])], check=True)
    return objects


def dynamic_shared() -> dict[str, int]:
    """Readable kernel name (without precision) -> bytes of dynamic shared memory, for the kernels that use it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sizes.cpp").write_text(SIZES)
        command = ["g++", "-std=c++17", "-w", f"-I{SHIM}", f"-I{SOURCES}", "sizes.cpp", "-o", "sizes"]
        subprocess.run(command, cwd=folder, check=True)
        numbers = subprocess.run([f"{folder}/sizes"], capture_output=True, text=True, check=True).stdout.split()
    kernels = ("pair_tiles", "pair_gradient", "pair_gram", "pair_update")
    names = [f"{kernel} {rows} rows" for kernel in kernels for rows in (64, 128)]
    pairs, strips = numbers[: len(names)], numbers[len(names) :]
    kinds = [f"render_strips {dtype} x3" for dtype in TYPES.values()]
    return {
        **dict(zip(names, map(int, pairs), strict=True)),
        **{f"{kind} x{columns}": int(size) for kind in kinds for columns, size in zip((1, 4), strips, strict=True)},
    }


def readable(demangled: str) -> str:
    """``void sfm::(anonymous namespace)::flow_sums<float, 4>(...)`` -> ``flow_sums float32 x4``."""
    match = re.match(r"(?:void )?(?:\w+::|\(anonymous namespace\)::)*(\w+)(?:<(.*?)>)?\(", demangled)
    if match is None:
        return demangled
    name, arguments = match.group(1), [part.strip() for part in (match.group(2) or "").split(",") if part]
    words = [name]
    for argument in arguments:
        if argument in TYPES:
            words.append(TYPES[argument])
        elif argument in ("true", "false"):
            words += SWITCHES.get(name, ("highest", "high"))[argument == "true"].split()
        else:
            words.append(f"{32 * int(argument)} rows" if name.startswith("pair") else f"x{argument}")
    return " ".join(words)


def rows(library_or_objects: str | Path | Iterable[str | Path] | None = None) -> list[dict[str, Any]]:
    """One row per kernel and architecture: kernel, arch, registers, spill_ops, shared, loads128, tensor_core.

    Reads the library or objects given, or compiles ``csrc/cuda`` into a temporary folder. ``shared`` counts static and
    dynamic shared memory in bytes (:data:`SIZES`).
    """
    if library_or_objects is None:
        with tempfile.TemporaryDirectory() as folder:
            return rows(compile_objects(Path(folder)))
    paths = [library_or_objects] if isinstance(library_or_objects, (str, Path)) else list(library_or_objects)
    dynamic, table = dynamic_shared(), []
    for path in paths:
        for arch in ARCHITECTURES:
            found = sass.kernels(path, arch)
            names = subprocess.run(["c++filt", *found], capture_output=True, text=True, check=True).stdout.splitlines()
            for (_, row), name in zip(found.items(), map(readable, names), strict=True):
                plain = re.sub(r" high(est)?\b", "", name)
                kept = {key: row[key] for key in ("registers", "spill_ops", "loads128", "tensor_core", "instructions")}
                table.append({"kernel": name, "arch": arch, "shared": row["shared"] + dynamic.get(plain, 0), **kept})
    return sorted(table, key=lambda row: (row["kernel"], ARCHITECTURES.index(row["arch"])))


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or None):
        print("  ".join(f"{key} {value}" if key != "kernel" else f"{value:34}" for key, value in row.items()))

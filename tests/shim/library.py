"""Build the package's C++ library from the CUDA kernels and their binding, compiled for the CPU emulator.

    python tests/shim/library.py FOLDER      # needs g++ and torch; then SFM_FAST_LIBRARIES=FOLDER

With it, backend "cpu" runs the CUDA kernels on CPU tensors, through the very code that hands them tensors on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHIM = Path(__file__).resolve().parent
CSRC = SHIM.parents[1] / "csrc"
SOURCES = (
    CSRC / "ops.cpp",
    CSRC / "cuda" / "binding_losses.cpp",
    CSRC / "cuda" / "binding_images.cpp",
    SHIM / "kernels.cpp",
)


def build(folder: Path) -> Path:
    """``folder``/_C.abi3.so. Raises ``CalledProcessError`` where it can't be compiled."""
    from torch.utils.cpp_extension import include_paths, library_paths

    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-w", "-DSFM_SHIM"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DTORCH_STABLE_ONLY", f"-I{SHIM}"]
    flags += [f"-I{path}" for path in include_paths()]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    target, beside = folder / "_C.abi3.so", folder / "beside.so"
    libraries = [f"-L{path}" for path in library_paths()]
    subprocess.run(["g++", "-shared", *objects, *libraries, "-ltorch_cpu", "-o", str(beside)], check=True)
    beside.rename(target)
    for name in objects:
        Path(name).unlink()
    return target


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))

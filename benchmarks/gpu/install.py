"""Make the package importable without installing it: a folder of links, and the libraries that were built beforehand.

    python benchmarks/gpu/install.py --site FOLDER --prepared .gpu [--build]

An installation would need a recent setuptools, and seconds; PYTHONPATH=FOLDER needs neither. Leaves a file BUILD in FOLDER where no
kernel takes a CUDA tensor; ``--build`` then compiles the libraries here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASK = """
import torch, sfm_fast
from sfm_fast.ops.library import problems
device = "cuda" if torch.cuda.is_available() else "cpu"
choice = sfm_fast.explain(torch.zeros(2, 1, device=device))
print(f"== {choice.backend} takes a {device} tensor; {problems or 'all libraries are there'}")
if choice.backend != device:
    raise SystemExit(3)
x = torch.randn(20, 8, device=device, requires_grad=True)
loss = sfm_fast.flow_alignment_loss(x, torch.randn(20, 8, device=device))
loss.backward()
print(f"== a loss of {loss.item():.4f}, a gradient of norm {x.grad.norm().item():.4f}")
"""


def link(site: Path) -> None:
    """Link the package's files in ``site``/sfm_fast, with kernels/ and benchmarks/ inside, and the pytest plugin."""
    package = site / "sfm_fast"
    shutil.rmtree(site, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "sfm_fast").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name in ("kernels", "benchmarks"):
        (package / name).symlink_to(ROOT / name)
    (site / "pytest_sfm_fast.py").symlink_to(ROOT / "pytest_sfm_fast.py")


def hash_of_sources(*folders: str) -> str:
    """The hash of names and contents of all C++ and CUDA files under ``folders``, the sources of a library."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".cpp", ".cu", ".h", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def copy_libraries(prepared: Path) -> None:
    """Copy the libraries in ``prepared``, unless they were built from sources other than the current ones."""
    try:
        known = json.loads((prepared / "contents.json").read_text())["libraries"]
    except (OSError, ValueError, KeyError):
        print(f"== nothing usable in {prepared.name}: `make gpu-prepare` fills it")
        return
    if known != hash_of_sources("csrc"):
        print(f"== the libraries in {prepared.name} were built from other sources: left alone")
        return
    for path in sorted(prepared.glob("_C*.so")):
        beside = ROOT / "sfm_fast" / f".{path.name}"
        shutil.copyfile(path, beside)
        beside.rename(ROOT / "sfm_fast" / path.name)
        print(f"== {path.name}, {path.stat().st_size / 1e6:.1f} MB, taken from {prepared.name}")


def build(dry: bool) -> None:
    """Build both libraries for this machine; dry: the CUDA kernels for CPU tensors, in the folder SFM_FAST_LIBRARIES."""
    environment = {**os.environ, "SFM_FAST_BUILD": "all"}
    environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if dry:
        command = [sys.executable, str(ROOT / "tests" / "shim" / "library.py"), os.environ["SFM_FAST_LIBRARIES"]]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    print(f"== built the libraries here: {'done' if done.returncode == 0 else f'failed with {done.returncode}'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.build:
        build(options.dry_run)
    elif not options.dry_run:  # a dry run doesn't change the libraries of this checkout
        copy_libraries(options.prepared)
    link(options.site)
    missing = options.site / "BUILD"
    missing.touch()  # also if the process is stopped before the check below ends
    done = subprocess.run([sys.executable, "-P", "-c", ASK], cwd=options.site)
    if done.returncode == 0:
        missing.unlink(missing_ok=True)
        return 0
    if not options.build:
        print("== so the libraries are built here")
    return done.returncode if options.build else 0


if __name__ == "__main__":
    sys.exit(main())

"""Build what a first run on a GPU takes along, on a machine without one: `make gpu-prepare`.

    python benchmarks/gpu/prepare.py [--folder .gpu]

Leaves in the folder, which git ignores: both compiled libraries (the CUDA one for sm_90), smoke (tests/gpu/smoke.cu) and what it should
print, the losses' expected values, what steps are predicted to take, and a list of all that. At most 40 MB. What was built from the same sources is not built again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.gpu import smoke  # noqa: E402
from benchmarks.gpu.install import hash_of_sources  # noqa: E402

MOST_BYTES = 40_000_000


def libraries(folder: Path, work: Path) -> None:
    """Build both libraries, for sm_90 only and outside the checkout."""
    environment = {**os.environ, "SFM_FAST_BUILD": "all", "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(work / "lib"), "--build-temp", str(work / "temp")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for name in ("_C", "_C_cuda"):
        built = sorted((work / "lib" / "sfm_fast").glob(f"{name}.*so"))
        if not built:
            raise SystemExit(f"error: {name} was not built: what the compiler said stands above")
        shutil.move(str(built[0]), folder / f"{name}.abi3.so")


def smoke_and_reference(folder: Path, work: Path) -> None:
    shutil.move(str(smoke.build(work, cpu=False)), folder / "smoke")
    text = smoke.output_of(smoke.build(work, cpu=True), log=work / "smoke.txt")
    if "failures 0" not in text:
        bad = [line for line in text.splitlines() if "error 0 bad 0" not in line]
        raise SystemExit("error: smoke fails on the CPU already:\n" + "\n".join(bad))
    shutil.move(str(work / "smoke.txt"), folder / "smoke.txt")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_contents(folder: Path) -> Mapping[str, object]:
    """The list that an earlier run wrote in ``folder``; empty if that run didn't finish."""
    path = folder / "contents.json"
    contents: Mapping[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return contents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    work, known = folder / "work", read_contents(folder)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    hashes = {"libraries": hash_of_sources("csrc"), "smoke": hash_of_sources("csrc/cuda", "tests/shim", "tests/gpu")}
    (folder / "contents.json").unlink(missing_ok=True)  # until everything is built
    try:
        if known.get("libraries") != hashes["libraries"]:
            libraries(folder, work)
        if known.get("smoke") != hashes["smoke"]:
            smoke_and_reference(folder, work)
        subprocess.run([sys.executable, str(ROOT / "tests" / "expected.py"), str(folder / "expected")], check=True)
        presets = ("imagenet-100", "imagenet-1k")
        predict = [sys.executable, "-P", "-m", "sfm_fast.benchmarks.gpu.steps", "--predict", "--preset", *presets]
        subprocess.run([*predict, "--out", str(folder / "predicted.json")], check=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    contents = {
        str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.glob("*")) if path.is_file()
    }
    contents["expected"] = size_of(folder / "expected")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    described = {
        **hashes,
        "commit": commit or None,
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "bytes": contents,
    }
    (folder / "contents.json").write_text(json.dumps(described, indent=1) + "\n")
    total = size_of(folder)
    for name, size in contents.items():
        print(f"{size / 1e6:8.2f} MB  {name}")
    print(f"{total / 1e6:8.2f} MB in {folder}, at most {MOST_BYTES / 1e6:.0f}")
    if total > MOST_BYTES:
        raise SystemExit("error: that is more than can be taken along")


if __name__ == "__main__":
    main()

"""Say what machine this is: card, memory, driver, versions. A line for what can't be read, and on."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata


def first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not there ({type(error).__name__})"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1] if lines else f"said nothing, exit code {done.returncode}"


def main() -> None:
    print(
        "== card:",
        first_line("nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm", "--format=csv,noheader"),
    )
    print("== python", platform.python_version(), "on", platform.platform())
    for tool in ("nvcc", "ncu", "compute-sanitizer"):
        print(f"== {tool}:", first_line(tool, "--version") if shutil.which(tool) else "not there")
    for name in ("torch", "triton", "numpy", "timm", "pytest"):  # without importing them, which takes seconds
        try:
            print(f"== {name}", metadata.version(name))
        except metadata.PackageNotFoundError:
            print(f"== {name}: not installed")


if __name__ == "__main__":
    main()

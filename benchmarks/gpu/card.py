"""Print a description of this machine: card, memory, driver, versions. What can't be read gets a line that says so."""

from __future__ import annotations

import platform
import re
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


def name() -> str:
    """The first card's name in nvidia-smi; empty if there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else ""


def folder_name(card: str) -> str:
    """The name of the folder of a card's results: the card's name in lower case, with dashes."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def main() -> None:
    print(
        "== card:",
        first_line("nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm", "--format=csv,noheader"),
    )
    print("== python", platform.python_version(), "on", platform.platform())
    for tool in ("nvcc", "ncu", "compute-sanitizer"):
        print(f"== {tool}:", first_line(tool, "--version") if shutil.which(tool) else "not there")
    for package in ("torch", "triton", "numpy", "timm", "pytest"):  # without importing them, which takes seconds
        try:
            print(f"== {package}", metadata.version(package))
        except metadata.PackageNotFoundError:
            print(f"== {package}: not installed")


if __name__ == "__main__":
    main()

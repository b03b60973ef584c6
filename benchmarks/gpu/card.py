"""Say what machine this is: card, memory, driver, versions. A line for what can't be read, and on."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys


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
    for module in ("torch", "triton", "numpy", "timm", "pytest"):
        try:
            print(f"== {module}", __import__(module).__version__)
        except Exception as error:  # whatever a broken module raises is what there is to say of it
            print(f"== {module}: {type(error).__name__}: {error}")
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        card = sys.modules["torch"].cuda.get_device_properties(0)
        print(
            f"== {card.name}: {card.total_memory / 2**30:.1f} GiB, {card.multi_processor_count} multiprocessors, sm_{card.major}{card.minor}"
        )
    else:
        print("== torch sees no GPU")


if __name__ == "__main__":
    main()

"""Run every command and every Python snippet the README shows, small: what a newcomer types must work.

The commands are read from the README itself; SMALLER appends options that shrink them, and nothing else is changed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALLER = {
    "distill": ["--steps", "10", "--grow-every", "2"],
    "classifier": ["--weight-decay", "1e-3"],
    "bundle": ["--views", "4"],
    "classify": [],
    "eval": ["--seeds", "1", "--epochs", "20", "--views", "3"],
    "stats": [],
    "plan": [],
    "bench": [],
    "info": [],
}
LEFT_TO_CI = ("make test", "make demo", "source ")  # .ci/run calls them itself, in an environment of its own
# The reader's own model and weights, and a preset of ten minutes: here small ones of the same kind.
STAND_INS = {"vit_small_patch14_dinov2": "test_vit", "laptop": "small", "bench/laptop.json": "bench/small.json"}
PREPARE = """
import sys; sys.path.insert(0, sys.argv[1])
import pathlib, timm, torch
from tests_data import write_image_folder
write_image_folder(pathlib.Path("mydata"))
torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), "weights.pth")
"""


def main() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", PREPARE, str(ROOT / "tests")], check=True, cwd=folder)
        for language, code in blocks:
            if language == "python":
                commands = [[sys.executable, "-c", code]]
            elif language == "bash":
                commands = [smaller(line) for line in code.splitlines() if line and not line.startswith(LEFT_TO_CI)]
            else:
                continue
            for command in commands:
                shown = "python snippet" if language == "python" else shlex.join(command)
                print(f"README: {shown}", flush=True)
                subprocess.run(command, check=True, cwd=folder, env=environment)
                ran += 1
    if ran < 14:
        sys.exit(f"only {ran} commands found in the README: has its form changed?")
    print(f"README: {ran} commands and snippets ran")


def smaller(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    if words[0] != "sfm-fast" or words[1] not in SMALLER:
        sys.exit(f"README command without a rule here: {line}")
    words = [STAND_INS.get(word, word) for word in words]
    return words + (["--suite", "step"] if "--predict" in words else SMALLER[words[1]])


if __name__ == "__main__":
    main()

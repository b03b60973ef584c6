"""Make the committed results of a GPU from the files that a run left: benchmarks/results/<card>/kernels.json and steps.json.

    python -m sfm_fast.benchmarks.gpu.results FOLDER [--name nvidia-h100]

FOLDER is $OUT of `scripts/gpu.sh`, or of its second run; the card's name is that in the JSON unless given. The README's tables and
docs/gpu.md take their rows from there (`make readme`). Refuses what was not measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sfm_fast.errors import InputError
from sfm_fast.files import write_json

from . import steps, times
from .card import folder_name

RESULTS = Path(__file__).resolve().parents[1] / "results"
KEPT = {"bench.json": ("kernels.json", times.FORMAT), "steps.json": ("steps.json", steps.FORMAT)}


def read(path: Path, wanted: str) -> dict[str, Any]:
    """A result file. Raises ``InputError`` if it is another kind of file or was measured on a CPU."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: wanted a result of {wanted!r}, but it can't be read ({error})") from None
    got = result.get("format") if isinstance(result, dict) else type(result)
    if got != wanted:
        raise InputError(f"{path}: wanted the format {wanted!r}, got {got!r}")
    if not result["environment"].get("gpu"):
        raise InputError(f"{path}: was not measured on a GPU (a dry run?); its figures say nothing about one")
    return dict(result)


def keep(folder: Path, name: str = "", results: Path = RESULTS) -> list[Path]:
    """Write the files of `KEPT` in ``folder`` to ``results``; returns their paths. Raises ``InputError`` if there are none."""
    here = {source: read(folder / source, wanted) for source, (_, wanted) in KEPT.items() if (folder / source).exists()}
    if not here:
        raise InputError(f"{folder}: wanted {' or '.join(KEPT)} in it, found neither")
    written = []
    for source, result in here.items():
        summary = folder / ("summary.txt" if source == "bench.json" else "steps.txt")
        if summary.exists():
            result["summary"] = summary.read_text().splitlines()
        target = results / (name or folder_name(result["environment"]["gpu"])) / KEPT[source][0]
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, result)
        written.append(target)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="", help="of the folder in benchmarks/results")
    options = parser.parse_args()
    try:
        for path in keep(options.folder, options.name):
            print(path)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

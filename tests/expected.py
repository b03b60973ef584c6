"""Fill a folder with the expected values of the losses' cases, for SFM_FAST_EXPECTED: ``python tests/expected.py FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import definitions
import expected_cache
import torch
from cases.losses import LOSS_CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fill(folder: Path, names: list[str] | None = None) -> int:
    """Compute what is missing of the cases ``names`` (None: all); how many files that were."""
    made = 0
    for case in LOSS_CASES:
        for dtype in DTYPES if names is None or case.name in names else ():
            inputs = definitions.inputs_of(case.name, dtype)
            for alignment, metric in definitions.KINDS:
                name = definitions.kept_name(case.name, dtype, alignment, metric, inputs)
                if not (folder / f"{name}.pt").exists():
                    expected_cache.write(folder, name, definitions.computed(inputs, alignment, metric))
                    made += 1
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)  # tensors of this size
    print(f"{fill(folder)} new files in {folder}")


if __name__ == "__main__":
    main()

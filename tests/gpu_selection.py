"""Which tests of test_gpu.py make the quick set (marker gpu_quick): for a machine that is lent by the minute.

float32 of everything, bfloat16 of a few cases; float16 differs from bfloat16 in loads and stores alone. Every kernel, backend,
kind and case is in it. What needs a card's whole memory has the marker gpu_alone instead, to be run last and by itself:

    pytest tests/gpu/test_gpu.py -n 12 -m gpu_quick
    pytest tests/gpu/test_gpu.py -m gpu_alone
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

# Cases of losses and images that are tested in bfloat16 too: a ragged one, labels, an unusual layout.
BFLOAT16 = {"odd", "labelled", "strided", "colour", "rows", "five-channels"}


def is_quick(item: pytest.Item, parameters: Mapping[str, Any]) -> bool:
    """Whether ``item`` of test_gpu.py, with these ``parameters``, is in the quick set."""
    if item.get_closest_marker("gpu_alone"):
        return False
    case = parameters.get("case", parameters.get("name"))
    name = getattr(case, "name", case)
    dtype = parameters.get("dtype", torch.float32)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and name in BFLOAT16)


def longest_first(items: list[pytest.Item]) -> None:
    """Bring what torch.compile takes half a minute for to the front: at the end, all other processes would wait for it."""
    items.sort(key=lambda item: "compile" not in item.name)

"""Where the tests of this folder run: on a GPU, or on CPU tensors in a dry run."""

from __future__ import annotations

import os

import pytest
import torch

DRY_RUN = not torch.cuda.is_available() and os.environ.get("SFM_FAST_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
needs_device = pytest.mark.skipif(not torch.cuda.is_available() and not DRY_RUN, reason="needs a GPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ["cuda", "triton"] if torch.version.hip is None else ["triton"]
if DRY_RUN:
    BACKENDS = ["cpu", "triton"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(tensor):
    """On the GPU with its own strides and storage offset."""
    storage = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
    storage.set_(tensor.untyped_storage())
    return storage.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

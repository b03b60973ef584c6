"""Expected values kept in a folder: what the slow definition gives, for machines whose time is dear.

The folder is named by SFM_FAST_EXPECTED and filled by ``python tests/expected.py FOLDER``. A file's name holds a hash of the
definition's source and of the case's inputs: one that is stale, or of another machine's random numbers, is never found.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sfm_fast.files import write_atomically

VARIABLE = "SFM_FAST_EXPECTED"


def fingerprint(functions: Iterable[FunctionType], inputs: Iterable[Tensor | None]) -> str:
    """Of the functions' source and of the inputs' values, dtypes and shapes."""
    found = hashlib.sha256()
    for function in functions:
        found.update(inspect.getsource(function).encode())
    for tensor in inputs:
        if tensor is None:
            found.update(b"none")
            continue
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def read(name: str) -> tuple[Tensor, ...] | None:
    """The tensors kept under ``name``; None without a folder or such a file, or, with a warning, where it can't be read."""
    folder = os.environ.get(VARIABLE)
    path = Path(folder or ".") / f"{name}.pt"
    if not folder or not path.exists():
        return None
    try:
        found: Any = torch.load(path, weights_only=True)
    except Exception as error:  # of a damaged file: whatever torch's reader meets first
        warnings.warn(f"{path}: can't be read ({error}); computed anew", RuntimeWarning, stacklevel=2)
        return None
    return tuple(found)


def write(folder: Path, name: str, values: tuple[Tensor, ...]) -> None:
    """Keep ``values`` in ``folder``, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.pt", lambda path: torch.save(list(values), path))

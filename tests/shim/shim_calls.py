"""Calls of the CUDA kernels on the CPU: the emulator's library, buffers whose margins are watched, and inputs."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHIM = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
MARGIN = 64  # elements before and after every buffer


def build(target: Path, *flags: str) -> ctypes.CDLL:
    command = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([*command, *flags, f"-I{SHIM}", str(SHIM / "shim_ops.cpp"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.last_message.restype = ctypes.c_char_p
    return library


class Call:
    """Arguments of one call: inputs copied between margins of NaN, outputs poisoned, both checked afterwards."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.held: list[tuple[Tensor, Tensor]] = []

    def place(self, tensor: Tensor, shift: int = 0) -> Tensor:
        """A copy of equal strides inside a larger buffer, ``shift`` elements off its 64-byte alignment."""
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        fill: Any = float("nan") if tensor.is_floating_point() else -1
        buffer = torch.full((size + 2 * MARGIN + shift + 64,), fill, dtype=tensor.dtype)
        skip = -(buffer.data_ptr() // tensor.element_size()) % 64 + MARGIN + shift
        view = buffer.as_strided(tensor.shape, tensor.stride(), skip)
        unique = slice(0, 1 if tensor.dim() and tensor.stride(0) == 0 else None)  # one row of memory, if expanded
        view[unique].copy_(tensor[unique])
        self.held.append((buffer, buffer.clone()))
        return view

    def poisoned(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, shift: int = 0) -> Tensor:
        return self.place(torch.full(shape, float("nan"), dtype=dtype), shift)

    def run(self, name: str, *arguments: Any, writes: tuple[Tensor, ...]) -> None:
        """Calls, raises on an error code, and checks that nothing but ``writes`` has changed."""

        def convert(value: Any) -> Any:
            if value is None or isinstance(value, Tensor):
                return ctypes.c_void_p(None if value is None else value.data_ptr())
            return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(int(value))

        code = self.library[name](*[convert(value) for value in arguments])
        assert code == 0, (code, self.library.last_message())
        for view in writes:
            for buffer, before in self.held:
                if buffer.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
                    before.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        for buffer, before in self.held:
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)), "wrote outside its outputs"


@dataclass
class Problem:
    """Features with labels or without, and the centres with their mean."""

    features: Tensor
    centers: Tensor
    labels: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    shift: Tensor


def make(
    classes: int,
    dims: int,
    dtype: torch.dtype = torch.float32,
    labelled: bool = False,
    mean: float = 0.0,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dims, generator=generator)
    counts = (
        torch.randint(1, 6, (classes,), generator=generator) if labelled else torch.ones(classes, dtype=torch.int64)
    )
    labels = torch.arange(classes).repeat_interleave(counts)
    labels = labels[torch.randperm(len(labels), generator=generator)] if labelled else labels
    features = (centers[labels] + torch.randn(len(labels), dims, generator=generator) + mean).to(dtype)
    centers = centers + mean
    shift = centers.double().mean(0).float()
    order = torch.argsort(labels, stable=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(labels, minlength=classes).cumsum(0)])
    if not labelled:
        return Problem(features, centers, None, None, None, shift)
    return Problem(features, centers, labels, order, offsets, shift)

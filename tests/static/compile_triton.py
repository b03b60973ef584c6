"""Every Triton kernel, compiled ahead of time for each target as its launcher would have it compiled: what came out.

The launchers run on meta tensors with the launch itself replaced, so block sizes, constants and what Triton specialises
on (alignment, strides of 1) are those of production. Needs no GPU. ``python tests/static/compile_triton.py`` prints it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sfm_fast.kernels import augment, class_means, flow_alignment, pair_alignment, render, segments
from sfm_fast.reference import flow_alignment as reference

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CLASSES, DIM, ITEMS = 1000, 768, 3000
Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _flow(
    kind: int, dtype: torch.dtype, labels: bool, forward: bool, classes: int = CLASSES, weight: float = 0.5
) -> None:
    features = _meta(ITEMS if labels else classes, DIM, dtype=dtype)
    order = _meta(ITEMS, dtype=torch.int64) if labels else None
    offsets = _meta(classes + 1, dtype=torch.int64) if labels else None
    centers, shift = _meta(classes, DIM), _meta(DIM)
    anchor = _meta(DIM) if kind == reference.ANCHORED else None
    if forward:
        flow_alignment.flow_alignment(features, order, offsets, centers, shift, anchor, kind, 1e-8, weight, 0.1)
    else:
        rows, columns = _meta(2, classes if kind in reference.PER_CLASS else 1), _meta(2, DIM)
        flow_alignment.flow_alignment_backward(_meta(), features, order, offsets, centers, shift, rows, columns)


def _means(dtype: torch.dtype, items: int = ITEMS) -> None:
    order, offsets = _meta(items, dtype=torch.int64), _meta(CLASSES + 1, dtype=torch.int64)
    class_means.class_means(_meta(items, DIM, dtype=dtype), order, offsets, _meta(DIM))
    class_means.class_means_backward(_meta(CLASSES, DIM), order, offsets, items, dtype)


def _pair(high: bool, classes: int, need_gradient: bool = True, grouped: bool = False) -> None:
    groups = _meta(classes, dtype=torch.int64) if grouped else None
    a, b = _meta(classes, DIM), _meta(classes, DIM)
    pair_alignment.pair_alignment(a, b, groups, 0, classes, 1e-8, need_gradient, high)


def _render(size: int, sides: tuple[int, ...], channels: int, flat: bool, dtype: torch.dtype) -> None:
    sizes = [channels * side * side for side in sides]
    views = _meta(100, sum(sizes)).split(sizes, 1) if flat else [_meta(100, number) for number in sizes]
    levels = [view.unflatten(1, (channels, side, side)) for view, side in zip(views, sides, strict=True)]
    render.render(levels, _meta(64, dtype=torch.int64), size, dtype)


def _render_backward(size: int, sides: tuple[int, ...], channels: int) -> None:
    images = _meta(100, channels, size, size)
    render.render_backward(images, images, list(sides))


def _augment(canvas: int, size: int, channels: int, dtype: torch.dtype) -> None:
    images, boxes, ones = _meta(100, channels, canvas, canvas), _meta(200, 4), _meta(3)
    items = _meta(200, dtype=torch.int64)
    augment.augment(images, boxes, items, size, ones, ones, 0.5, 0.2, 5, 7, 2, dtype)
    grad = _meta(200, 3, size, size, dtype=dtype)
    augment.augment_backward(grad, boxes, ones, 100, channels, canvas, canvas, FP32)


BF16, FP32 = torch.bfloat16, torch.float32
PYRAMID = (1, 8, 64, 128, 256)  # a level of each kind: more only take longer to compile
CALLS: dict[str, Callable[[], None]] = {
    "global bf16": lambda: _flow(0, BF16, False, True),
    "global bf16, 200k classes": lambda: _flow(0, BF16, False, True, 200_000),
    "global fp32": lambda: _flow(0, FP32, False, True),
    "global bf16 labels": lambda: _flow(0, BF16, True, True),
    "class bf16": lambda: _flow(1, BF16, False, True),
    "anchored bf16": lambda: _flow(5, BF16, False, True, weight=0.0),
    "anchored bf16, lengths": lambda: _flow(5, BF16, False, True),
    "decoupled bf16": lambda: _flow(4, BF16, False, True),
    "bf16": lambda: _flow(0, BF16, False, False),
    "fp32": lambda: _flow(0, FP32, False, False),
    "bf16 labels": lambda: _flow(0, BF16, True, False),
    "means bf16": lambda: _means(BF16),
    "highest": lambda: _pair(False, 1000),
    "highest, groups": lambda: _pair(False, 1000, grouped=True),
    "highest, no gradient": lambda: _pair(False, 1000, need_gradient=False),
    "highest, 5k classes": lambda: _pair(False, 5000),
    "high": lambda: _pair(True, 1000),
    "256": lambda: _render(256, PYRAMID, 3, False, FP32),
    "256 of a wider tensor": lambda: _render(256, PYRAMID, 3, True, FP32),
    "28 grey": lambda: _render(28, (1, 2, 4, 8, 16, 28), 1, False, BF16),
    "256 backward": lambda: _render_backward(256, PYRAMID, 3),
    "28 grey backward": lambda: _render_backward(28, (1, 2, 4, 8, 16, 28), 1),
    "256 to 224": lambda: _augment(256, 224, 3, BF16),
    "28 grey to 30": lambda: _augment(28, 30, 1, FP32),
}


@contextmanager
def _recorded(arch: str, target: GPUTarget) -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def record(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((fn, args, kwargs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        stack.enter_context(mock.patch.object(segments, "IS_HIP", target.backend == "hip"))
        stack.enter_context(mock.patch.object(pair_alignment, "architecture", return_value=arch))
        yield launches


def _compile(launch: Launch, target: GPUTarget) -> tuple[str, Any]:
    """(what tells this specialisation from others, the compiled kernel), by the steps of ``JITFunction.run``."""
    fn, args, kwargs = launch
    backend = make_backend(target)
    options = {"debug": False, **kwargs}
    bound, specialization, rest = create_function_from_signature(fn.signature, fn.params, backend)(*args, **options)
    parsed, signature, constants, attributes = fn._pack_args(backend, options, bound, specialization, rest)
    key = f"{fn.__name__} {specialization} {sorted(kwargs.items())}"
    source = ASTSource(fn, signature, constants, attributes)
    return key, lambda: triton.compile(source, target=target, options=parsed.__dict__)


def _nvidia(compiled: Any, arch: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (row,) = sass.kernels(path, arch).values()
    return {
        "registers": row["registers"],
        "spills": row["spill_ops"],
        "shared": compiled.metadata.shared,
        "loads128": row["loads128"],
        "tensor_core": row["tensor_core"],
    }


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{key}:\s*(\d+)", text))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
        "shared": compiled.metadata.shared,
        "loads128": len(re.findall(r"\b(?:global|buffer)_load_(?:lds_)?dwordx4\b", text)),
        "tensor_core": len(re.findall(r"\bv_mfma_", text)),
    }


def rows(targets: list[str] | None = None) -> list[dict[str, Any]]:
    """One row a kernel variant and target: kernel, arch, registers, spills, shared, loads128, tensor_core."""
    if not isinstance(class_means._means_kernel, JITFunction):
        raise RuntimeError("compile in a process without TRITON_INTERPRET")
    table: list[dict[str, Any]] = []
    for arch in targets or list(TARGETS):
        target = TARGETS[arch]
        seen: set[str] = set()
        for call, run in CALLS.items():
            with _recorded(arch, target) as launches:
                run()
            for launch in launches:
                key, build = _compile(launch, target)
                if key in seen:
                    continue
                seen.add(key)
                compiled = build()
                found = _amd(compiled) if target.backend == "hip" else _nvidia(compiled, arch)
                extra = [name.lower() for name in ("MIRROR", "LAST", "WRITE", "SUM") if launch[2].get(name)]
                name = launch[0].__name__.strip("_").removesuffix("_kernel")
                table.append({"kernel": f"{name} ({', '.join([call, *extra])})", "arch": arch, **found})
    return table


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or None):
        print(f"{row.pop('kernel'):54s}", *(f"{key} {value}" for key, value in row.items()))

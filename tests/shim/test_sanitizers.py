"""The C++ build under the address and undefined-behaviour sanitizers, every operation on ragged shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXERCISE = """
import sys, torch
torch.set_num_threads(2)
torch.ops.load_library(sys.argv[1])
ops = torch.ops.sfm_fast
for classes, dim in ((1, 3), (2, 1), (3, 5), (17, 33), (70, 100), (300, 129)):
    items = classes + 7
    labels = torch.cat([torch.arange(classes), torch.arange(7) % classes])
    ordered, order = labels.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(classes + 1))
    centers, shift = torch.randn(classes, dim), torch.randn(dim)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for features, segments in ((torch.randn(items, dim), (order, offsets)), (torch.randn(classes, dim), (None, None))):
            features = features.to(dtype)
            means = ops.class_means(features, *segments, shift)
            ops.class_means_backward(means, *segments, len(features), dtype)
            for kind in range(6) if classes > 1 else (5,):
                anchor = torch.randn(dim) if kind == 5 else None
                _, rows, columns = ops.flow_alignment(features, *segments, centers, shift, anchor, kind, 1e-8, 0.5, 0.1)
                ops.flow_alignment_backward(torch.tensor(1.0), features, *segments, centers, shift, rows, columns)
    if classes == 1:
        continue
    groups = torch.arange(classes) // 2
    ops.pair_alignment(centers, means, None, 0, classes, 1e-8, True, False)
    ops.pair_alignment(centers, means, groups, classes // 3, classes - 1, 1e-8, True, False)
    ops.pair_alignment(centers, means, groups, 1, 1, 1e-8, True, False)
for bad in ((order[:-1], offsets), (order + 1, offsets), (order, offsets.flip(0)), (order, None)):
    try:
        ops.class_means(torch.randn(items, dim), *bad, shift)
    except RuntimeError:
        continue
    raise AssertionError("bad segments were taken")
nan, inf = float("nan"), float("inf")
boxes = [(0, 1, 0, 1), (0.3, 0.05, 0.2, 4), (9, -0.7, 3, 0), (-5, 1.6, -4, 1.5), (1e30, 1, 0, 1), (nan, inf, -inf, nan),
         (3e38, 3e38, -3e38, -3e38), (2**31, 1, -(2**31), -1), (-1, 0, 0, 1), (-0.5, 1e-30, 1e9, -1e8)]
for canvas, sides, size in ((1, (1,), 1), (2, (1, 2), 5), (15, (1, 4, 15, 15), 17), (16, (16,), 48), (17, (3, 17), 33),
                            (33, (1, 2, 4, 8, 16, 32, 33), 15), (20, (3,), 65)):
    for channels, backbone in ((1, 1), (1, 3), (3, 3)):
        flat = torch.randn(5, channels * sum(side * side for side in sides))
        parts = flat.split([channels * side * side for side in sides], 1)
        levels = [part.unflatten(1, (channels, side, side)) for part, side in zip(parts, sides)]
        choices = (None, torch.tensor([4, 0, 4]), torch.tensor([], dtype=torch.int64))
        for dtype, rows in zip((torch.float32, torch.bfloat16, torch.float16), choices if canvas % 2 else choices[1::-1] * 2):
            count = 5 if rows is None else len(rows)
            images = ops.render(levels, rows, canvas, dtype)
            ops.render_backward(torch.randn(images.shape).to(dtype).transpose(2, 3), images, list(sides))
            box = torch.tensor(boxes).repeat(count, 1)
            items = torch.arange(len(box)) * 400_000_007 % 2**32 - 1
            mean, std = torch.rand(backbone), torch.rand(backbone) + 0.1
            constants = size, mean, std, 0.5, 0.2, -5, 2**32 - 1, 2
            seen = ops.augment(images, box, items, *constants, dtype)
            ops.augment_backward(seen, box, std, *images.shape, dtype)
            ops.augment_backward(torch.ones(()).to(dtype).expand(seen.shape), box, std, *images.shape, torch.float32)
            ops.render_augment(levels, rows, canvas, box, items, *constants, dtype)
            ops.render_augment_backward(seen, levels, rows, canvas, box, std)
    tall = torch.rand(2, 5, canvas, 3).to(torch.bfloat16)
    seen = ops.augment(tall, box[:4], items[:4], size, torch.rand(5), torch.rand(5), 0.5, 0.2, 1, 0, 2, torch.float16)
    ops.augment_backward(seen, box[:4], torch.rand(5), *tall.shape, torch.float32)

level, image, box, one = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 6, 6), torch.rand(4, 4), torch.rand(3)
items, grad, f32 = torch.zeros(4, dtype=torch.int64), torch.rand(4, 3, 5, 5), torch.float32
noise = (0.5, 0.2, 1, 0, 2)


def views(**changes):
    values = {"box": box, "items": items, "size": 5, "mean": one, "std": one} | changes
    return *values.values(), *noise


BAD = [
    (ops.render, ([], None, 6, f32)),
    (ops.render, ([level] * 65, None, 6, f32)),
    (ops.render, ([level], None, 3, f32)),
    (ops.render, ([level], None, 0, f32)),
    (ops.render, ([level], None, 2**14 + 1, f32)),
    (ops.render, ([level], None, 6, torch.float64)),
    (ops.render, ([level.double()], None, 6, f32)),
    (ops.render, ([level[0]], None, 6, f32)),
    (ops.render, ([level[:, :2]], None, 6, f32)),
    (ops.render, ([level[:, :, :2]], None, 6, f32)),
    (ops.render, ([level, level[:1]], None, 6, f32)),
    (ops.render, ([level[:, :, :0, :0]], None, 6, f32)),
    (ops.render, ([level], torch.tensor([2]), 6, f32)),
    (ops.render, ([level], torch.tensor([-1]), 6, f32)),
    (ops.render, ([level], torch.tensor([0.0]), 6, f32)),
    (ops.render, ([level], torch.tensor([[0]]), 6, f32)),
    (ops.render_backward, (image[:1], image, [4])),
    (ops.render_backward, (image.double(), image, [4])),
    (ops.render_backward, (image[:, :2], image[:, :2], [4])),
    (ops.render_backward, (image[..., :5], image[..., :5], [4])),
    (ops.render_backward, (image, image, [])),
    (ops.render_backward, (image, image, [7])),
    (ops.render_backward, (image, image, [0])),
    (ops.render_backward, (image, image, [-1])),
    (ops.augment, (image[0], *views(), f32)),
    (ops.augment, (image.long(), *views(), f32)),
    (ops.augment, (image[:, :2], *views(), f32)),
    (ops.augment, (image[:, :, :0], *views(), f32)),
    (ops.augment, (image[:0], *views(), f32)),
    (ops.augment, (image, *views(), torch.int32)),
    (ops.augment, (image, *views(box=box[:3], items=items[:3]), f32)),
    (ops.augment, (image, *views(box=box[:, :3]), f32)),
    (ops.augment, (image, *views(box=box.double()), f32)),
    (ops.augment, (image, *views(items=items[:3]), f32)),
    (ops.augment, (image, *views(items=items.int()), f32)),
    (ops.augment, (image, *views(size=0), f32)),
    (ops.augment, (image, *views(size=2**14 + 1), f32)),
    (ops.augment, (image, *views(mean=one[:2]), f32)),
    (ops.augment, (image, *views(mean=one.double()), f32)),
    (ops.augment, (image, *views(std=one[:0], mean=one[:0]), f32)),
    (ops.augment, (image, *views(std=one[:2], mean=one[:2]), f32)),
    (ops.augment_backward, (grad, box, one, 3, 3, 6, 6, f32)),
    (ops.augment_backward, (grad, box, one, 0, 3, 6, 6, f32)),
    (ops.augment_backward, (grad, box, one, 2, 2, 6, 6, f32)),
    (ops.augment_backward, (grad, box, one, 2, 3, 0, 6, f32)),
    (ops.augment_backward, (grad, box, one, 2, 3, 6, -6, f32)),
    (ops.augment_backward, (grad, box, one, -2, 3, 6, 6, f32)),
    (ops.augment_backward, (grad, box, one, 2, 3, 6, 6, torch.float64)),
    (ops.augment_backward, (grad[:2], box, one, 2, 3, 6, 6, f32)),
    (ops.augment_backward, (grad[:, :2], box, one, 2, 3, 6, 6, f32)),
    (ops.augment_backward, (grad[..., :4], box, one, 2, 3, 6, 6, f32)),
    (ops.render_augment, ([level], None, 3, *views(), f32)),
    (ops.render_augment, ([level], torch.tensor([0, 1, 1]), 6, *views(), f32)),
    (ops.render_augment, ([level], torch.tensor([0, 2]), 6, *views(), f32)),
    (ops.render_augment, ([level], None, 6, *views(items=items[:2]), f32)),
    (ops.render_augment_backward, (grad[:2], [level], None, 6, box, one)),
    (ops.render_augment_backward, (grad[:, :, :4], [level], None, 6, box, one)),
    (ops.render_augment_backward, (grad, [level], torch.tensor([0, 2]), 6, box, one)),
    (ops.render_augment_backward, (grad, [level.bfloat16()], None, 6, box, one)),
]
for operation, given in BAD:
    try:
        operation(*given)
    except RuntimeError:
        continue
    raise AssertionError(f"{operation} took bad arguments, number {[pair[1] is given for pair in BAD].index(True)}")
print("all operations ran")
"""


@pytest.mark.soak
def test_address_and_undefined_behaviour(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    # libstdc++ beside it: the sanitizer looks for __cxa_throw before Python has loaded any C++.
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(runtime).exists() for runtime in runtimes):
        pytest.skip("needs libasan")
    torch_folder = Path(torch.__file__).parent
    library = tmp_path / "libsanitized.so"
    sources = [str(ROOT / "csrc" / "ops.cpp"), *map(str, sorted((ROOT / "csrc" / "cpu").glob("*.cpp")))]
    flags = [
        "-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-fno-math-errno",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DTORCH_STABLE_ONLY",
        f"-I{torch_folder / 'include'}", f"-I{sysconfig.get_paths()['include']}",
    ]  # fmt: skip
    link = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-shared"]

    def compiled(source: str) -> str:
        target = str(tmp_path / f"{Path(source).stem}.o")
        subprocess.run([compiler, "-c", source, *flags, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, *objects, *flags, *link, "-o", str(library)], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    for isa in ("avx512", "avx2", "base"):
        done = subprocess.run(
            [sys.executable, "-c", EXERCISE, str(library)],
            capture_output=True,
            text=True,
            env={**environment, "SFM_FAST_CPU_ISA": isa},
        )
        assert done.returncode == 0, done.stderr[:3000]
        assert "all operations ran" in done.stdout

"""What the C++ operations allocate past torch's allocator, and so past every figure of memory, stays small."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sfm_fast

COUNTER = r"""
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
// Bytes that code between `low` and `high` holds through operator new, and the most of them at once.
static std::atomic<uintptr_t> low{1}, high{0};
static std::atomic<long> held{0}, most{0};
struct alignas(16) Header { long counted; };
void* operator new(size_t size) {
  auto* header = static_cast<Header*>(std::malloc(size + sizeof(Header)));
  if (!header) throw std::bad_alloc();
  auto caller = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  header->counted = caller >= low && caller < high ? long(size) : 0;
  long now = held += header->counted, before = most;
  while (now > before && !most.compare_exchange_weak(before, now)) {}
  return header + 1;
}
void operator delete(void* pointer) noexcept {
  if (!pointer) return;
  auto* header = static_cast<Header*>(pointer) - 1;
  held -= header->counted;
  std::free(header);
}
void operator delete(void* pointer, size_t) noexcept { operator delete(pointer); }
extern "C" void watch(uintptr_t from, uintptr_t to) { low = from; high = to; most = held.load(); }
extern "C" long peak() { return most; }
"""
RUN = """
import ctypes, sys
import torch, sfm_fast
from sfm_fast.benchmarks.shapes import ImageShape, LossShape
torch.set_num_threads(2)
counter = ctypes.CDLL(None)
counter.watch.argtypes = [ctypes.c_size_t] * 2
sfm_fast.flow_alignment_loss(torch.randn(3, 4), torch.randn(3, 4))
spans = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(sys.argv[1])]
assert spans, "the library isn't loaded"
low, high = min(int(a, 16) for a, _ in spans), max(int(b, 16) for _, b in spans)
losses = LossShape("global", 2000, 1024, 3), LossShape("class", 2000, 1024), LossShape("anchored", 2000, 1024), LossShape("pair", 700, 768)
for shape in (*losses, ImageShape(6, 256, 224)):
    if isinstance(shape, LossShape):
        features, centers, labels = shape.inputs(torch.device("cpu"))
        made = features.requires_grad_()
        counter.watch(low, high)
        sfm_fast.flow_alignment_loss(made, centers, labels, alignment=shape.alignment, backend="cpu").backward()
    else:
        levels, views = shape.inputs(torch.device("cpu"))
        levels = [level.requires_grad_() for level in levels]
        counter.watch(low, high)
        sfm_fast.render_augment(levels, shape.canvas, views, backend="cpu").sum().backward()
    print(shape.name, counter.peak(), sep=";")
"""


def test_scratch_past_the_allocator_is_small(tmp_path):
    compiler = shutil.which("g++")
    found = next(Path(sfm_fast.__file__).parent.glob("_C.*so"), None)
    if compiler is None or found is None:
        pytest.skip("needs g++ and the C++ library")
    source, shim = tmp_path / "counter.cpp", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(shim)], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    done = subprocess.run([sys.executable, "-c", RUN, str(found)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peaks = {name: int(count) for name, count in (line.split(";") for line in done.stdout.splitlines())}
    assert len(peaks) == 5
    assert all(0 < count < 1 << 20 for count in peaks.values()), peaks

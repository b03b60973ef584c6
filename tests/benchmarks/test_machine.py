"""Measuring a GPU: ceilings, what empties its caches, device time, graphs. The logic runs here, with the GPU's parts replaced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfm_fast.benchmarks import harness, machine
from sfm_fast.benchmarks.rows import Row
from sfm_fast.benchmarks.suites import losses as bench_flow_alignment
from sfm_fast.measure import timing as perf

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=["none", "tf32"])
def precision(request):
    """What the process has set for float32 products."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


def test_ceilings_of_a_gpu(monkeypatch, precision):
    asked = []

    def rate(device, size, dtype=torch.float32):
        asked.append((size, dtype, torch.backends.cuda.matmul.fp32_precision))
        return float(len(asked))

    monkeypatch.setattr(machine, "matmul_rate", rate)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: 7.0)
    assert machine.ceilings(GPU) == {"copy_bandwidth": 7.0, "matmul_rate": 1.0, "tf32_rate": 2.0, "bf16_rate": 3.0}
    assert asked[0] == (8192, torch.float32, "ieee")
    assert asked[1] == (8192, torch.float32, "tf32")
    assert asked[2][:2] == (8192, torch.bfloat16)
    assert torch.backends.cuda.matmul.fp32_precision == precision


def test_flags_come_back_after_an_error(precision):
    with pytest.raises(ValueError, match="no memory"), machine.float32_products("ieee"):
        raise ValueError("no memory")
    assert torch.backends.cuda.matmul.fp32_precision == precision


def test_ceilings_of_a_cpu(monkeypatch):
    monkeypatch.setattr(machine, "_seconds", lambda call, device: call() is not None and 2.0)
    found = machine.ceilings(CPU)
    assert found == {"copy_bandwidth": 2 * 4 * 2**26 / 2, "matmul_rate": 2 * 2048**3 / 2}


@pytest.mark.parametrize(("free", "elements"), [(100 << 30, 1 << 29), (4 << 30, 1 << 28)])
def test_copies_on_a_gpu_are_of_two_gigabytes_where_there_is_room(monkeypatch, free, elements):
    made = []

    def randn(count, device):
        made.append(count)
        return torch.zeros(1)

    monkeypatch.setattr(machine, "free_memory", lambda device: free)
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(machine, "_seconds", lambda call, device: 0.5)
    assert machine.copy_bandwidth(GPU) == 2 * 4 * elements / 0.5
    assert made == [elements]


def test_the_cache_is_flushed_by_reading():
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.overloadpacket.__name__, args[0].nbytes))
            written.extend(out.nbytes for out in (kwargs or {}).values() if isinstance(out, torch.Tensor))
            return func(*args, **kwargs or {})

    seen, written = [], []
    flush = perf.cache_flush(CPU, 1 << 20)
    with Ops():
        flush()
    assert seen == [("sum", 1 << 20)]
    assert written == [4]
    assert perf.L2_BYTES >= 256 << 20


class FakeEvent:
    """A device clock on which each recording is 5 ms after the last one."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.now += 5.0
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.mark.parametrize("cold", [False, True])
def test_device_time_is_that_between_events(monkeypatch, cold):
    order = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(perf, "cache_flush", lambda device: lambda: order.append("flush"))
    found = perf.samples({"a": lambda: order.append("a")}, rounds=3, warmup=0, device=GPU, cold=cold, events=True)
    assert found == {"a": [0.005] * 3}
    assert order == (["flush", "a"] if cold else ["a"]) * 3


@pytest.mark.parametrize(
    ("seconds", "replays"), [(1e-6, 200), (0.004, 200), (0.02, 50), (0.06, 16), (0.4, 5), (3.0, 5)]
)
def test_about_a_second_of_replays(monkeypatch, seconds, replays):
    asked = fake_graphs(monkeypatch, seconds)
    assert harness.graph_microseconds(lambda: None) == pytest.approx(seconds * 1e6)
    assert asked == [(1, True), (replays, True)]


def fake_graphs(monkeypatch, seconds):
    """Graphs whose replay takes ``seconds``; gives the list of (rounds, cold) that are asked for."""
    asked = []

    def captured(function, warmup=3):
        function()
        return SimpleNamespace(replay=lambda: None), None

    def samples(functions, *, rounds, device, cold, events):
        assert events
        asked.append((rounds, cold))
        return {"graph": [seconds] * rounds}

    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(harness, "samples", samples)
    return asked


def test_many_calls_in_one_graph_are_warm(monkeypatch):
    asked, calls = fake_graphs(monkeypatch, 5e-4), []
    assert harness.graph_microseconds(lambda: calls.append(1), 50) == pytest.approx(10.0)
    assert len(calls) == 50
    assert asked == [(1, False), (200, False)]


@pytest.mark.parametrize(("microseconds", "wanted"), [(15.0, {1, 50}), (5000.0, {1})])
def test_rows_have_both_graph_times_where_a_launch_matters(monkeypatch, microseconds, wanted):
    asked = set()

    def graph(call, calls=1):
        asked.add(calls)
        return microseconds / calls

    monkeypatch.setattr(harness, "graph_microseconds", graph)
    monkeypatch.setattr(harness, "samples", lambda functions, **options: {name: [1.0] * 5 for name in functions})
    monkeypatch.setattr(harness, "attempt", lambda function, device: (None, 0.001, ""))
    one = harness.Contender(Row("s", "c", "ours", "both"), lambda: None, graph=True)
    (row,) = harness.measure([one], GPU, harness.Plan(0.01, memory=False))
    assert asked == wanted
    assert row.graph_microseconds == microseconds
    assert row.graph50_microseconds == (microseconds / 50 if 50 in wanted else None)


def test_the_ceiling_of_pairs():
    gpu = {"matmul_rate": 1.0, "tf32_rate": 8.0}
    ceiling = bench_flow_alignment._rate
    for backend in ("cuda", "triton"):
        for exact in (True, False):
            ours = bench_flow_alignment.Entry(abs, backend, exact)
            assert ceiling(ours, gpu) == "tf32_rate"
            assert ceiling(ours, {"matmul_rate": 1.0}) == "matmul_rate"
    for other in (bench_flow_alignment.Entry(abs, "torch"), bench_flow_alignment.Entry(abs)):
        assert ceiling(other, gpu) == "matmul_rate"

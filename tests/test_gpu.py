"""Every kernel on a real GPU: accuracy, CUDA graphs, streams, determinism, memory, more than 2^31 elements. Skipped without one."""

from __future__ import annotations

import definitions
import pytest
import torch
from definitions import value_and_gradient

import sfm_fast
from sfm_fast.ops.backends import ALIGNMENTS, METRICS
from sfm_fast.testing.cases import LOSS_CASES
from sfm_fast.testing.perf import peak_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ["cuda", "triton"] if torch.version.hip is None else ["triton"]
KINDS = [(alignment, metric) for alignment in ALIGNMENTS for metric in METRICS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(case, dtype):
    return [None if tensor is None else tensor.cuda() for tensor in case.make(dtype)]


def keep_strides(case, dtype):
    """Like `on_gpu`, but with the case's own strides and storage offset."""
    features, centers, labels = case.make(dtype)
    storage = torch.empty(features.untyped_storage().nbytes() // features.element_size(), dtype=dtype)
    storage.set_(features.untyped_storage())
    moved = storage.cuda().as_strided(features.shape, features.stride(), features.storage_offset())
    return moved, centers.cuda(), None if labels is None else labels.cuda()


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("alignment", "metric"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_torch(case, alignment, metric, dtype, backend):
    expected, expected_gradient = definitions.expected(case.name, dtype, alignment, metric)
    features, centers, labels = keep_strides(case, dtype)

    def run(which):
        return value_and_gradient(
            lambda z: sfm_fast.flow_alignment_loss(
                z, centers, labels, alignment=alignment, metric=metric, backend=which
            ),
            features,
        )

    scale = expected_gradient.abs().max().item()
    scale = scale if scale > 1e-9 else 1.0
    (loss, gradient), (plain, plain_gradient) = run(backend), run("torch")
    assert gradient.dtype == dtype
    assert (loss.cpu() - expected).abs() <= 1.5 * (plain.cpu() - expected).abs() + 2e-6 * (1 + expected.abs())
    ours = (gradient.cpu().double() - expected_gradient).abs().max().item() / scale
    theirs = (plain_gradient.cpu().double() - expected_gradient).abs().max().item() / scale
    tolerance = (1e-5 if alignment == "pair" else 2e-6) + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    assert ours <= 1.5 * theirs + tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_decoupled(backend, alpha):
    features, centers, labels = on_gpu(LOSS_CASES[5], torch.float32)
    expected, expected_gradient = value_and_gradient(
        lambda z: sfm_fast.decoupled_flow_loss(z, centers, labels, alpha=alpha), features.double()
    )
    loss, gradient = value_and_gradient(
        lambda z: sfm_fast.decoupled_flow_loss(z, centers, labels, alpha=alpha, backend=backend), features
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (500, 131), (3000, 384), (4500, 64)], ids=str)
def test_pairs_at_size(backend, precision, grouped, shape):
    generator = torch.Generator().manual_seed(1)
    centers, features = (torch.randn(shape, generator=generator).cuda() for _ in range(2))
    groups = torch.arange(shape[0], device="cuda") // 3 if grouped else None

    def run(which, z):
        return value_and_gradient(
            lambda x: sfm_fast.flow_alignment_loss(
                x, centers, alignment="pair", backend=which, precision=precision, groups=groups
            ),
            z,
        )

    (exact, exact_gradient), (loss, gradient) = run("torch", features.double()), run(backend, features)
    bound = 1e-5 if precision == "highest" else 5e-3
    assert (loss - exact).abs() <= bound
    assert (gradient - exact_gradient).norm() <= bound * exact_gradient.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("labelled", [False, True])
def test_cuda_graph(backend, alignment, labelled):
    features, centers, labels = on_gpu(LOSS_CASES[5], torch.float32)
    if not labelled:
        features, labels = features[:10].contiguous(), None
    module = sfm_fast.FlowAlignmentLoss(centers, alignment=alignment, backend=backend)
    static = features.clone().requires_grad_()

    def step():
        loss = module(static, labels)
        return loss.detach(), torch.autograd.grad(loss, static)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = torch.randn_like(features)
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    loss, gradient = value_and_gradient(lambda z: module(z, labels), fresh)
    assert torch.equal(captured[0], loss)
    assert torch.equal(captured[1], gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_same_bits_on_every_run_and_stream(backend, alignment):
    generator = torch.Generator().manual_seed(2)
    centers, features = (
        torch.randn(700, 256, generator=generator).cuda(),
        torch.randn(1500, 256, generator=generator).cuda(),
    )
    labels = torch.cat([torch.arange(700), torch.randint(0, 700, (800,), generator=generator)]).cuda()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment=alignment, backend=backend)
    first = value_and_gradient(lambda z: module(z, labels), features)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = value_and_gradient(lambda z: module(z, labels), features)
        torch.cuda.synchronize()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_nan_out(backend, alignment, bad):
    features, centers, labels = on_gpu(LOSS_CASES[5], torch.float32)
    features[3, 2] = bad
    assert sfm_fast.flow_alignment_loss(features, centers, labels, alignment=alignment, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend):
    classes, dim = 70_000, 32_768  # 2.3e9 elements, 4.6 GB in bfloat16
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    centers = torch.randn(classes, dim, device="cuda", dtype=torch.bfloat16)
    features = torch.randn(classes, dim, device="cuda", dtype=torch.bfloat16)
    shift = torch.zeros(dim, device="cuda")
    from sfm_fast.ops.flow_alignment import flow_alignment

    small = centers.float()
    small -= small.mean(0)
    loss, gradient = value_and_gradient(lambda z: flow_alignment(z, None, small, shift, 0, backend=backend), features)
    # The last row, computed by itself: gradient = p a + q (t - m), with p and q from the sums in float64.
    dot = sum((small[rows].double() * features[rows].double()).sum() for rows in torch.arange(classes).chunk(16))
    aa = sum(small[rows].double().square().sum() for rows in torch.arange(classes).chunk(16))
    mean = sum(features[rows].double().sum(0) for rows in torch.arange(classes).chunk(16)) / classes
    bb = sum((features[rows].double() - mean).square().sum() for rows in torch.arange(classes).chunk(16))
    cosine = dot / (aa.sqrt() * bb.sqrt())
    assert (1 - loss.double() - cosine).abs() <= 1e-6
    last = -small[-1].double() / (aa.sqrt() * bb.sqrt()) + cosine / bb * (features[-1].double() - mean)
    assert (gradient[-1].double() - last).norm() <= 1e-2 * last.norm()


def test_imagenet_21k_pairs_fit_in_300_megabytes():
    classes, dim = 21_841, 1024
    centers, features = (
        torch.randn(classes, dim, device="cuda"),
        torch.randn(classes, dim, device="cuda").requires_grad_(),
    )
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", backend=BACKENDS[0])
    assert peak_memory(lambda: module(features).backward(), "cuda") <= 300e6


def test_compile_and_device_of_the_tensors():
    features, centers, labels = on_gpu(LOSS_CASES[5], torch.float32)
    module = sfm_fast.FlowAlignmentLoss(centers)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(features, labels), module(features, labels))
    assert sfm_fast.explain(features).backend in BACKENDS
    if torch.cuda.device_count() > 1:
        other = sfm_fast.FlowAlignmentLoss(centers.to("cuda:1"))
        torch.testing.assert_close(
            other(features.to("cuda:1"), labels.to("cuda:1")).cpu(), module(features, labels).cpu()
        )


def test_tensors_on_different_devices_are_named():
    features, centers, labels = on_gpu(LOSS_CASES[5], torch.float32)
    with pytest.raises(sfm_fast.InputError, match="features are on cuda"):
        sfm_fast.flow_alignment_loss(features, centers.cpu(), labels)
    with pytest.raises(sfm_fast.InputError, match="labels are on cpu"):
        sfm_fast.flow_alignment_loss(features, centers, labels.cpu())

"""The kernels of the losses on a real GPU: accuracy, CUDA graphs, streams, determinism, memory, more than 2^31 elements. Skipped without one.

gpu_selection.py says what the markers gpu_quick and gpu_alone choose. With SFM_FAST_DRY_RUN=1 and no GPU the tests that need no
device of their own run on CPU tensors, so that none fails for a typing error when there is a GPU: Triton in its interpreter, and the CUDA
kernels where SFM_FAST_LIBRARIES names what tests/shim/library.py has built of them.
"""

from __future__ import annotations

import definitions
import pytest
import torch
from cases.losses import LOSS_CASES
from definitions import KINDS, NAMES, value_and_gradient
from gpu_device import BACKENDS, DEVICE, DRY_RUN, DTYPES, moved, needs_device, needs_gpu

import sfm_fast
from sfm_fast.measure.memory import peak_memory
from sfm_fast.measure.timing import captured

pytestmark = needs_device


def on_gpu(case, dtype):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in case.make(dtype)]


def keep_strides(case, dtype):
    """Like `on_gpu`, but with the case's own strides and storage offset."""
    features, centers, labels = case.make(dtype)
    return moved(features), centers.to(DEVICE), None if labels is None else labels.to(DEVICE)


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("alignment", "metric"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_torch(case, alignment, metric, dtype, backend):
    expected, expected_gradient = definitions.expected(case.name, dtype, alignment, metric)
    features, centers, labels = keep_strides(case, dtype)

    def run(which):
        return value_and_gradient(
            lambda z: definitions.loss(z, centers, labels, alignment=alignment, metric=metric, backend=which),
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
def test_a_single_class(backend):
    features, centers, _ = on_gpu(LOSS_CASES[5], torch.float32)
    anchor = definitions.anchor_of(centers)

    def run(which, z):
        one = sfm_fast.anchored_flow_loss(z, centers[:1], anchor=anchor, length_weight=0.7, backend=which)
        return one + sfm_fast.decoupled_flow_loss(z, centers[:1], backend=which)

    (exact, exact_gradient), (loss, gradient) = (
        value_and_gradient(lambda z: run("torch", z), features[:1].double()),
        value_and_gradient(lambda z: run(backend, z), features[:1]),
    )
    assert (loss - exact).abs() <= 1e-5 * exact
    assert (gradient - exact_gradient).norm() <= 1e-5 * exact_gradient.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", [(64, 128)] if DRY_RUN else [(64, 128), (500, 131), (3000, 384), (4500, 64)], ids=str)
def test_pairs_at_size(backend, precision, grouped, shape):
    generator = torch.Generator().manual_seed(1)
    centers, features = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    groups = torch.arange(shape[0], device=DEVICE) // 3 if grouped else None

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
def test_clusters_of_close_classes(backend):
    """Tensor cores truncate what they add to: 2048 classes in 64 clusters a tenth as wide as they lie apart, 1024 features."""
    classes, dim, clusters = (96, 64, 8) if DRY_RUN else (2048, 1024, 64)
    generator = torch.Generator().manual_seed(3)

    def normal(count):
        return torch.randn(count, dim, generator=generator)

    centers = normal(clusters)[torch.arange(classes) % clusters] + 0.1 * normal(classes)
    features = (centers + 0.1 * normal(classes)).to(DEVICE)
    centers = centers.to(DEVICE)

    def run(which, z):
        return value_and_gradient(
            lambda x: sfm_fast.flow_alignment_loss(x, centers, alignment="pair", backend=which), z
        )

    (exact, exact_gradient), (loss, gradient) = run("torch", features.double()), run(backend, features)
    plain, plain_gradient = run("torch", features)
    assert (loss - exact).abs() <= 1.5 * (plain - exact).abs() + 1e-6
    error, theirs = ((one - exact_gradient).norm() / exact_gradient.norm() for one in (gradient, plain_gradient))
    assert error <= 1.5 * theirs + 1e-5


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", NAMES)
@pytest.mark.parametrize("labelled", [False, True])
def test_cuda_graph(backend, alignment, labelled):
    features, centers, labels = on_gpu(LOSS_CASES[5], torch.float32)
    if not labelled:
        features, labels = features[:10].contiguous(), None
    module = definitions.module(centers, alignment=alignment, backend=backend)
    static = features.clone().requires_grad_()

    def step():
        loss = module(static, labels)
        return loss.detach(), torch.autograd.grad(loss, static)[0]

    graph, replayed = captured(step)
    fresh = torch.randn_like(features)
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    loss, gradient = value_and_gradient(lambda z: module(z, labels), fresh)
    assert torch.equal(replayed[0], loss)
    assert torch.equal(replayed[1], gradient)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", NAMES)
def test_same_bits_on_every_run_and_stream(backend, alignment):
    generator = torch.Generator().manual_seed(2)
    centers, features = (
        torch.randn(700, 256, generator=generator).to(DEVICE),
        torch.randn(1500, 256, generator=generator).to(DEVICE),
    )
    labels = torch.cat([torch.arange(700), torch.randint(0, 700, (800,), generator=generator)]).to(DEVICE)
    module = definitions.module(centers, alignment=alignment, backend=backend)
    first = value_and_gradient(lambda z: module(z, labels), features)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = value_and_gradient(lambda z: module(z, labels), features)
        torch.cuda.synchronize()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_nan_out(backend, alignment, bad):
    features, centers, labels = on_gpu(LOSS_CASES[5], torch.float32)
    features[3, 2] = bad
    assert definitions.loss(features, centers, labels, alignment=alignment, backend=backend).isnan()


@needs_gpu
@pytest.mark.gpu_alone
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend):
    classes, dim = 70_000, 32_768  # 2.3e9 elements, 4.6 GB in bfloat16
    torch.cuda.empty_cache()  # what this process has kept doesn't count as free
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    centers = torch.randn(classes, dim, device=DEVICE, dtype=torch.bfloat16)
    features = torch.randn(classes, dim, device=DEVICE, dtype=torch.bfloat16)
    shift = torch.zeros(dim, device=DEVICE)
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


@needs_gpu
@pytest.mark.gpu_alone
def test_imagenet_21k_pairs_fit_in_200_megabytes():
    classes, dim = 21_841, 1024
    centers, features = (
        torch.randn(classes, dim, device=DEVICE),
        torch.randn(classes, dim, device=DEVICE).requires_grad_(),
    )
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", backend=BACKENDS[0])
    torch.cuda.empty_cache()  # blocks of other sizes would be taken whole
    assert peak_memory(lambda: module(features).backward(), "cuda") <= 200e6


@needs_gpu
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


@needs_gpu
def test_tensors_on_different_devices_are_named():
    features, centers, labels = on_gpu(LOSS_CASES[5], torch.float32)
    with pytest.raises(sfm_fast.InputError, match="features are on cuda"):
        sfm_fast.flow_alignment_loss(features, centers.cpu(), labels)
    with pytest.raises(sfm_fast.InputError, match="labels are on cpu"):
        sfm_fast.flow_alignment_loss(features, centers, labels.cpu())

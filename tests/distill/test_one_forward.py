"""Separable losses: micro-batches of whole classes go forward once; equal to the one-shot step in every way of running it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_step import _Spoil, count_calls, distiller, gradient_of_step, run_out

from sfm_fast import ClassStatistics
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.distill.predict import predict_step
from sfm_fast.distill.step import StepFailed

CLASSES = 4
SEPARABLE = {
    "anchored": {"method": "sfm-anchored", "length_weight": 0.1},
    "decoupled": {"method": "sfm-decoupled"},
}


def made_statistics(backbone, clusters=0):
    generator = torch.Generator().manual_seed(0)
    found = ClassStatistics(CLASSES, backbone.num_features, clusters=clusters, covariance=True)
    found.update(torch.randn(80, backbone.num_features, generator=generator), torch.arange(80) % CLASSES)
    found.provenance = {"channels": 1}
    return found


@pytest.fixture(scope="module")
def statistics(backbone):
    return made_statistics(backbone)


@pytest.fixture(params=SEPARABLE)
def options(request):
    return SEPARABLE[request.param]


def test_nothing_runs_twice(backbone, statistics, options):
    """Ipc 3, two views: groups of whole classes, each forward once with a graph; a class larger than a micro-batch takes two passes."""
    counted, sizes = count_calls(backbone)
    several = options | {"ipc": 3, "views": 2}
    for micro_batch, expected in (
        (12, [(24, True)]),
        (7, [(12, True)] * 2),
        (3, [(6, True)] * 4),
        (2, [(4, False), (2, True), (4, True)] * 4),
    ):
        sizes.clear()
        distiller(counted, statistics, Execution(micro_batch), **several).step()
        assert sizes == expected


@pytest.mark.parametrize("views", [1, 2])
def test_cluster_level_is_separable_over_images(backbone, options, views):
    statistics = made_statistics(backbone, clusters=5)
    more = options | {"ipc": 5, "level": "cluster", "views": views}
    loss, expected = gradient_of_step(distiller(backbone, statistics, Execution(20), **more))
    counted, sizes = count_calls(backbone)
    for micro_batch in (1, 3, 7):
        sizes.clear()
        again, gradient = gradient_of_step(distiller(counted, statistics, Execution(micro_batch), **more))
        assert sum(size for size, _ in sizes) == 20 * views
        assert (again - loss).abs() <= 1e-6 * (1 + loss.abs())
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("micro_batch", [2, 3, 7, 12])
def test_the_state_on_the_host_changes_no_bit(backbone, statistics, options, micro_batch):
    results = []
    for state in ("device", "host"):
        made = distiller(backbone, statistics, Execution(micro_batch, state=state), ipc=3, **options)
        losses = [made.step() for _ in range(3)]
        results.append((torch.stack(losses), made.images.pyramid.data.clone(), made.optimiser.exp_avg_sq.clone()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("micro_batch", [2, 3, 6])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, backbone, statistics, options, micro_batch):
    def run(folder, steps, resume=False):
        config = DistillConfig.paper(steps=steps, ipc=3, centers="discriminant", grow_every=2, **options)
        made = make_distiller(config, backbone, None, statistics, execution=Execution(micro_batch))
        made.run(folder, resume=resume, progress=False)
        return made.images.pyramid.data

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    assert torch.equal(run(tmp_path / "parts", 6, resume=True), whole)


@pytest.mark.parametrize(
    ("when", "most"), [((), 1), ((), 3), ((0,), 3), ((1,), 100), ((2,), 100), ((0, 2), 3), ((0, 3), 100)], ids=str
)
def test_out_of_memory_loses_no_step(backbone, statistics, options, when, most):
    plain = distiller(backbone, statistics, Execution(12), ipc=3, **options)
    limited = distiller(run_out(backbone, when, most), statistics, Execution(6), ipc=3, **options)
    for _ in range(2):
        assert abs(plain.step() - limited.step()) < 1e-5
    assert limited.micro_batch <= min(most, 3 if when else 6)
    difference = (limited.images.pyramid - plain.images.pyramid).abs()
    assert difference.median() < 1e-6
    assert difference.max() < 0.05  # Adam's first steps follow signs: gradients of rounding size may go either way


@pytest.mark.parametrize(("most", "torn"), [(0, False), (1, True)])
def test_out_of_memory_says_whether_anything_was_updated(backbone, statistics, options, most, torn):
    calls = []

    def run(views):
        calls.append(len(views))
        if len(calls) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backbone.model(views)

    made = distiller(dataclasses.replace(backbone, run=run), statistics, Execution(2), **options)
    before = made.images.pyramid.data.clone()
    with pytest.raises(StepFailed, match="single image") as caught:
        made.step()
    assert caught.value.torn == torn
    assert torch.equal(made.images.pyramid.data, before) == (not torn)


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
@pytest.mark.parametrize("where", [0, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_what_is_not_finite_says_whether_anything_was_updated(
    backbone, statistics, options, micro_batch, where, spoilt
):
    """Classes come in order here, so a fault in the first one is found before any update."""
    made = distiller(backbone, statistics, Execution(micro_batch), **options)
    made.step()
    state = [tensor.clone() for tensor in made.optimiser.state]
    terms, fault = made.objective.terms, float("nan")

    def spoil(features, labels, step, chosen):
        if where in chosen and spoilt == "gradient":
            features = _Spoil.apply(features, where - chosen.start, fault)
        elif where in chosen:
            features = features * fault
        return terms(features, labels, step, chosen)

    made.objective.terms = spoil
    with pytest.raises(StepFailed, match=f"{spoilt} became nan or infinite") as caught:
        made.step()
    untouched = where < micro_batch
    assert caught.value.torn == (not untouched)
    assert all(torch.equal(*pair) for pair in zip(state, made.optimiser.state, strict=True)) == untouched
    assert all(tensor.isfinite().all() for tensor in made.optimiser.state)


@pytest.mark.parametrize("ipc", [1, 3])
def test_the_prediction_knows_it(backbone, options, ipc):
    """Operations of whole classes are those of one shot; the features of all images are no longer in memory."""
    config = DistillConfig.paper(ipc=ipc, **options)
    classes = 40
    shot, small, smallest = (predict_step(config, backbone, classes, 1, size) for size in (None, 6, 2))
    assert small.flops == shot.flops
    assert small.peak_bytes < shot.peak_bytes / 2
    coupled = predict_step(DistillConfig.paper(ipc=ipc), backbone, classes, 1, 6)
    assert coupled.flops > 1.2 * small.flops
    forward = coupled.flops - small.flops
    if ipc == 3:  # of each class two images run forward twice
        repeated = (classes * ipc - 1) // 6 * 6
        assert smallest.flops - small.flops == pytest.approx(forward * (2 * classes) / repeated, rel=1e-6)
    else:
        assert smallest.flops == shot.flops


def test_a_method_of_ones_own_needs_no_terms(backbone, statistics):
    """A separable objective that only has `loss` gets the features and labels of whole classes."""
    made = distiller(backbone, statistics, Execution(2), method="sfm-decoupled")
    centers = statistics.centers.float()

    class Plain(type(made.objective)):
        def terms(self, features, labels, step, chosen):
            assert labels.unique().tolist() == list(chosen)
            return (features - centers[labels]).square().mean()

    made.objective.__class__ = Plain
    _, expected = gradient_of_step(distiller(backbone, statistics, Execution(4), method="sfm-decoupled"))
    _, gradient = gradient_of_step(made)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()

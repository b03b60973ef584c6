"""Images made for several backbones at once: the gradient is the sum of theirs in every way of running a step, with one backbone's activations at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_step import count_calls, gradient_of_step

from sfm_fast import ClassStatistics, InputError
from sfm_fast.backbones.load import load_backbone, shape_of_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.distill.plan import plan
from sfm_fast.distill.predict import predict_step
from sfm_fast.distill.step import StepFailed
from sfm_fast.evaluation.evaluator import Evaluator, ProbeConfig
from sfm_fast.measure.memory import peak_memory
from sfm_fast.synthetic import SyntheticSet

CLASSES = 4
VARIANTS = [
    {"method": "sfm-anchored", "length_weight": 0.5},
    {"method": "sfm-anchored", "ipc": 3, "views": 2},
    {"method": "sfm-decoupled"},
    {"method": "sfm-decoupled", "alpha": 0.5, "ipc": 3},
    {},
    {"metric": "mse", "views": 2},
]


def made_statistics(backbone, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    found = ClassStatistics(CLASSES, backbone.num_features, covariance=True)
    found.update(scale * torch.randn(80, backbone.num_features, generator=generator), torch.arange(80) % CLASSES)
    found.provenance = {"channels": 1}
    return found


@pytest.fixture(scope="module")
def backbones(backbone):
    """Two for grey images of 28 px, and one for colour images of 32 px."""
    return backbone, load_backbone("fashion_cnn"), load_backbone("test_vit", weights="random", image_size=32)


@pytest.fixture(scope="module")
def statistics(backbones):
    return [made_statistics(one, seed, 10.0**seed) for seed, one in enumerate(backbones)]


def distiller(backbones, statistics, micro_batch=100, state="device", **options):
    config = DistillConfig.paper(**({"steps": 4, "grow_every": 2, "lr": 0.02, "size": 32} | options))
    made = make_distiller(config, backbones, None, statistics, execution=Execution(micro_batch, state=state))
    made.grow_fully()
    return made


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_gradient_is_the_sum_of_the_backbones(backbones, statistics, options):
    """Squared errors are divided by the within-class variance, which is 1, 100 and 10 000 here; other losses have no scale."""
    free = options.get("metric") != "mse" and options.get("method") != "sfm-decoupled"
    loss, expected = 0.0, 0.0
    for one, its in zip(backbones, statistics, strict=True):
        weight = 1.0 if free else 1 / float(its.within_covariance.diagonal().mean())
        part, gradient = gradient_of_step(distiller(one, its, **options))
        loss, expected = loss + weight * part, expected + weight * gradient
    images = CLASSES * options.get("ipc", 1)
    for micro_batch in (images, 5, 2, 1):
        found, gradient = gradient_of_step(distiller(backbones, statistics, micro_batch, **options))
        assert (found - loss).abs() <= 1e-5 * (1 + loss.abs())
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), micro_batch


def test_lgm_too(backbone, backbones):
    source, options = open_dataset("embedded", "train"), {"method": "lgm", "steps": 4, "views": 2, "size": 28}
    parts = []
    for some in (backbone, backbones[1], backbones[:2]):
        made = make_distiller(DistillConfig.paper(**options), some, source, execution=Execution(10))
        parts.append(gradient_of_step(made))
    (_, one), (_, two), (loss, both) = parts
    assert loss.isfinite()
    assert (both - one - two).norm() <= 1e-5 * both.norm()


def test_backbones_take_turns(backbones, statistics):
    """A group that is one micro-batch goes forward once on each backbone, whose graph is gone before the next one goes forward."""
    order = []

    def watched(name, backbone):
        def run(views):
            features = backbone.model(views)
            order.append((name, len(views), torch.is_grad_enabled()))
            if torch.is_grad_enabled():
                features.register_hook(lambda gradient: order.append((name, "back")))
            return features

        return dataclasses.replace(backbone, run=run)

    two = [watched(name, one) for name, one in zip("ab", backbones, strict=False)]
    made = distiller(two, statistics[:2], 2, method="sfm-anchored")
    made.step()
    assert order == [("a", 2, True), ("a", "back"), ("b", 2, True), ("b", "back")] * 2
    order.clear()
    distiller(two, statistics[:2], 4).step()
    assert order == [("a", 4, True), ("a", "back"), ("b", 4, True), ("b", "back")]
    order.clear()
    # The paper's loss needs the features of all images first: only the last micro-batch on the last backbone isn't run again.
    distiller(two, statistics[:2], 2).step()
    forward = [(entry[0], entry[2]) for entry in order if len(entry) == 3]
    assert forward == [("a", False), ("a", False), ("b", False), ("b", True), ("a", True), ("b", True), ("a", True)]


@pytest.mark.parametrize("options", VARIANTS[:2] + VARIANTS[4:5], ids=str)
@pytest.mark.parametrize("micro_batch", [2, 5])
def test_the_state_on_the_host_changes_no_bit(backbones, statistics, options, micro_batch):
    results = []
    for state in ("device", "host"):
        made = distiller(backbones, statistics, micro_batch, state, **options)
        losses = [made.step() for _ in range(3)]
        results.append((torch.stack(losses), made.images.pyramid.data.clone(), made.optimiser.exp_avg_sq.clone()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("options", VARIANTS[:2] + VARIANTS[4:5], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_out_of_memory_loses_no_step(backbones, statistics, options, which, when):
    """Memory runs out on one of the backbones with more than three images, in the forward or in the backward pass."""

    class Limited(torch.autograd.Function):
        @staticmethod
        def forward(context, features):
            return features.clone()

        @staticmethod
        def backward(context, gradient):
            if when == "backward" and len(gradient) > 3 * options.get("views", 1):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient

    def run(views):
        if when == "forward" and len(views) > 3 * options.get("views", 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Limited.apply(backbones[which].model(views))

    limited = [dataclasses.replace(one, run=run) if place == which else one for place, one in enumerate(backbones)]
    loss, expected = gradient_of_step(distiller(backbones, statistics, **options))
    made = distiller(limited, statistics, **options)
    found, gradient = gradient_of_step(made)
    assert made.micro_batch <= 3
    assert (found - loss).abs() <= 1e-5
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_out_of_memory_says_whether_anything_was_updated(backbones, statistics):
    calls = []

    def run(views):
        calls.append(len(views))
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backbones[1].model(views)

    limited = [backbones[0], dataclasses.replace(backbones[1], run=run)]
    made = distiller(limited, statistics[:2], 2, method="sfm-anchored")
    with pytest.raises(StepFailed, match="single image") as caught:
        made.step()
    assert caught.value.torn


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, backbones, statistics):
    def run(folder, steps, resume=False, some=backbones, known=statistics):
        config = DistillConfig.paper(method="sfm-anchored", steps=steps, ipc=2, grow_every=2, lr=0.02)
        made = make_distiller(config, some, None, known, execution=Execution(3))
        made.run(folder, resume=resume, progress=False)
        return made.images.pyramid.data

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "parts", 3)
    assert torch.equal(run(tmp_path / "parts", 5, resume=True), whole)
    for some in (slice(0, 2), slice(None, None, -1), slice(0, 1)):
        with pytest.raises(InputError, match="the run has another backbone"):
            run(tmp_path / "parts", 6, resume=True, some=backbones[some], known=statistics[some])


def test_memory_is_that_of_one_backbone_at_a_time(backbones, statistics):
    """Predicted and measured: the largest backbone's step, and little more; operations add."""
    config = DistillConfig.paper(method="sfm-anchored", length_weight=0.5, size=32)
    alone = [predict_step(config, one, CLASSES, 1, count_parameters=False) for one in backbones]
    together = predict_step(config, backbones, CLASSES, 1, count_parameters=False)
    # Besides the features and gradients of the others, which are small.
    assert 1 <= together.peak_bytes / max(one.peak_bytes for one in alone) < 1.03
    assert together.flops == pytest.approx(sum(one.flops for one in alone), rel=1e-3)
    made = distiller(backbones, statistics, method="sfm-anchored", length_weight=0.5)
    made.step()
    state = sum(tensor.nbytes for tensor in made.optimiser.state)
    measured = peak_memory(made.step, backbones[0].device)
    assert together.peak_bytes - state == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("micro_batch", [1, 3, 12])
@pytest.mark.parametrize("method", ["sfm", "sfm-anchored"])
def test_operations_are_counted_for_every_forward_pass(backbones, method, micro_batch):
    counted, sizes = zip(*(count_calls(one) for one in backbones), strict=True)
    config = DistillConfig.paper(method=method, ipc=3, size=32)
    made = make_distiller(
        config, counted, None, [made_statistics(one) for one in backbones], execution=Execution(micro_batch)
    )
    made.grow_fully()
    made.step()
    forward = [sum(size for size, _ in some) for some in sizes]
    shot = [predict_step(config, one, CLASSES, 1) for one in backbones]
    # Of one backbone with a single term, micro-batches run all but the last one again, which shows the cost of a forward pass.
    coupled = DistillConfig.paper(ipc=3, size=32)
    again = [
        (predict_step(coupled, one, CLASSES, 1, 1).flops - predict_step(coupled, one, CLASSES, 1).flops) / 11
        for one in backbones
    ]
    expected = sum(one.flops + (count - 12) * passes for one, count, passes in zip(shot, forward, again, strict=True))
    found = predict_step(config, backbones, CLASSES, 1, micro_batch)
    assert found.flops == pytest.approx(expected, rel=1e-3)


def test_plan_shows_the_sum(backbones):
    shapes = [shape_of_backbone("fashion_vit"), shape_of_backbone("fashion_cnn")]
    config = DistillConfig.paper(method="sfm-anchored")
    both, one, two = (plan(config, some, 10, 1, memory=10**9) for some in (shapes, shapes[:1], shapes[1]))
    for rows in zip(both, one, two, strict=True):
        flops = [row["flops_per_step"] for row in rows]
        assert flops[0] == pytest.approx(flops[1] + flops[2], rel=1e-3)
        assert rows[0]["peak_bytes"] < rows[1]["peak_bytes"] + rows[2]["peak_bytes"]


def test_a_set_of_several_backbones_is_evaluated_on_each(tmp_path, backbones):
    source, test = (open_dataset("embedded", split) for split in ("train", "test"))
    made = make_distiller(DistillConfig.paper(method="sfm-decoupled", steps=2), backbones[:2], source, progress=False)
    made.run(tmp_path / "run", progress=False)
    synthetic = SyntheticSet.load(tmp_path / "run" / "synthetic.safetensors")
    assert [one["name"] for one in synthetic.metadata["backbones"]] == ["fashion_vit", "fashion_cnn"]
    probe = ProbeConfig(seeds=1, epochs=2, views=2)
    for phi in backbones[:2]:
        (row,) = Evaluator(phi, test, distilling=phi, config=probe, progress=False).evaluate_synthetic(synthetic)
        assert (row["backbone"], row["images"]) == (phi.name, "sfm")
    with pytest.raises(InputError, match="none of the others either: 'fashion_cnn'"):
        Evaluator(backbones[2], test, distilling=backbones[2], config=probe, progress=False).check_synthetic(synthetic)


def test_what_is_wrong_is_said(backbone, backbones, statistics):
    config = DistillConfig.paper(method="sfm-anchored", steps=1)
    for some, known, said in (
        ([], [], "at least one, got none"),
        ([backbone, backbone], statistics[:2], "must differ, got 'fashion_vit' with the same weights twice"),
        ([backbone, "fashion_cnn"], statistics[:2], "or a list of them, got"),
        (backbones, statistics[:2], "one for each of the 3 backbones, in order, got 2"),
        (backbones[:2], statistics[0], "one for each of the 2 backbones, in order, got 1"),
        (backbones[:2], statistics[1::-1], "features, but backbone 'fashion_vit' gives"),
        (backbones, None, "needs class statistics, or the data set"),
    ):
        with pytest.raises(InputError, match=said):
            make_distiller(config, some, None, known)
    other = made_statistics(backbones[1])
    other.class_names = list("abcd")
    with pytest.raises(InputError, match="its 4 classes are not"):
        make_distiller(config, backbones[:2], None, [statistics[0], other])
    plain = ClassStatistics(CLASSES, backbones[1].num_features)
    plain.update(torch.randn(8, backbones[1].num_features), torch.arange(8) % CLASSES)
    make_distiller(config, backbones[:2], None, [statistics[0], plain])
    squared = DistillConfig.paper(method="sfm-decoupled", steps=1)
    with pytest.raises(InputError, match="without a covariance, by which squared errors"):
        make_distiller(squared, backbones[:2], None, [statistics[0], plain])
    same = ClassStatistics(CLASSES, backbones[1].num_features, covariance=True)
    same.update(torch.eye(CLASSES, backbones[1].num_features), torch.arange(CLASSES))
    with pytest.raises(InputError, match="no class has two different features"):
        make_distiller(squared, backbones[:2], None, [statistics[0], same])

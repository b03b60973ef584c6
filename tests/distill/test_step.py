"""The step: micro-batches give the one-shot gradient, Adam runs block by block, memory may run out, the state may lie on the host."""

from __future__ import annotations

import dataclasses
import gc
import itertools

import pytest
import torch

from sfm_fast import ClassStatistics, InputError
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.checkpoint import load_checkpoint
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.distill.images import SyntheticImages
from sfm_fast.distill.optimiser import PyramidAdam
from sfm_fast.distill.step import MicroBatch, StepFailed
from sfm_fast.measure.memory import is_out_of_memory
from sfm_fast.reference import augment, render
from sfm_fast.synthetic import SyntheticSet
from sfm_fast.units import parse_bytes
from sfm_fast.views import draw_views

CLASSES = 4


@pytest.fixture(scope="module")
def statistics(backbone):
    generator = torch.Generator().manual_seed(0)
    found = ClassStatistics(CLASSES, backbone.num_features)
    found.update(torch.randn(40, backbone.num_features, generator=generator), torch.arange(40) % CLASSES)
    found.provenance = {"channels": 1}
    return found


def distiller(backbone, statistics, execution=Execution(), source=None, **options):
    config = DistillConfig.paper(**({"steps": 4, "grow_every": 2, "lr": 0.02} | options))
    made = make_distiller(config, backbone, source, statistics, execution=execution)
    made.grow_fully()
    return made


def gradient_of_step(made):
    """Gradient of the whole pyramid in one step, caught where Adam would take it."""
    caught = {}
    pyramid = made.images.pyramid.data

    def update(state, gradient, skip):
        first = (state[0].data_ptr() - pyramid.data_ptr()) // pyramid[:1].nbytes
        caught[first] = gradient.clone()
        assert not skip

    made.optimiser.update = update
    loss = made.step()
    return loss, torch.cat([caught[first] for first in sorted(caught)])


VARIANTS = [
    {},
    {"alignment": "class"},
    {"alignment": "pair"},
    {"metric": "mse"},
    {"alignment": "pair", "metric": "mse"},
    {"method": "sfm-decoupled", "alpha": 0.5},
    {"method": "sfm-decoupled"},
    {"method": "sfm-decoupled", "ipc": 5, "views": 2},
    {"method": "sfm-anchored", "ipc": 3},
    {"method": "sfm-anchored", "views": 2, "length_weight": 0.1},
    {"ipc": 3},
    {"ipc": 3, "alignment": "pair"},
    {"views": 2},
    {"views": 3, "ipc": 2, "alignment": "class"},
    {"parametrization": "pixel"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_micro_batches_give_the_one_shot_gradient(backbone, statistics, options):
    images = CLASSES * options.get("ipc", 1)
    loss, expected = gradient_of_step(distiller(backbone, statistics, Execution(images), **options))
    assert expected.shape[0] == images
    assert (expected.norm(dim=1) > 0).all()
    for micro_batch in {1, 3, images - 1}:
        again, gradient = gradient_of_step(distiller(backbone, statistics, Execution(micro_batch), **options))
        assert (again - loss).abs() <= 1e-6 * (1 + loss.abs())
        assert (gradient - expected).norm() <= 1e-6 * expected.norm(), micro_batch


@pytest.mark.parametrize("variant", ["closed-form", "frozen", "stock"])
def test_lgm_too(backbone, variant):
    source = open_dataset("embedded", "train")
    options = {"method": "lgm", "lgm_variant": variant, "views": 2, "source": source}
    try:
        loss, expected = gradient_of_step(distiller(backbone, None, Execution(10), **options))
        again, gradient = gradient_of_step(distiller(backbone, None, Execution(4), **options))
    finally:
        backbone.model.requires_grad_(False)
    assert (again - loss).abs() <= 1e-6
    assert (gradient - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("views", [1, 2])
def test_the_one_shot_gradient_is_autograd_of_the_definition(backbone, statistics, views):
    made = distiller(backbone, statistics, Execution(CLASSES), views=views)
    _, gradient = gradient_of_step(made)
    levels = [level.clone().requires_grad_() for level in made.images.levels]
    drawn = draw_views(
        torch.arange(views * CLASSES), (28, 28), 28, backbone.mean, backbone.std, seed=0, step=0
    )  # fmt: skip
    features = backbone(augment.augment(render.render(levels, 28), drawn))
    made.objective.loss(features, made.labels.repeat(views), 0).backward()
    expected = torch.cat([level.grad.flatten(1) for level in levels], dim=1)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def count_calls(backbone):
    sizes = []

    def run(views):
        sizes.append((len(views), torch.is_grad_enabled()))
        return backbone.model(views)

    return dataclasses.replace(backbone, run=run), sizes


def test_nothing_runs_twice_that_need_not(backbone, statistics):
    counted, sizes = count_calls(backbone)
    distiller(counted, statistics, Execution(CLASSES)).step()
    assert sizes == [(CLASSES, True)]
    sizes.clear()
    distiller(counted, statistics, Execution(2), ipc=2, views=2).step()
    assert sizes == [(4, False)] * 3 + [(4, True)] * 4  # the last micro-batch keeps its graph


def test_blockwise_adam_is_adam():
    images = SyntheticImages(5, 3, 8, seed=1)
    while not images.fully_grown:
        images.grow()
    theirs = images.pyramid.data.clone().requires_grad_()
    adam, ours = torch.optim.Adam([theirs], lr=0.1, fused=True), PyramidAdam(images, 0.1)
    for step in range(4):
        gradient = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(step))
        theirs.grad = gradient.clone()
        adam.step()
        for begin, end in ((3, 5), (0, 2), (2, 3)):
            ours.update(tuple(part[begin:end] for part in ours.state), gradient[begin:end], torch.zeros(()))
        ours.steps += 1
    torch.testing.assert_close(images.pyramid.data, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_the_state_on_the_host_changes_no_bit(backbone, statistics):
    results = []
    for state in ("device", "host"):
        made = distiller(backbone, statistics, Execution(3, state=state), ipc=2)
        losses = [made.step() for _ in range(3)]
        results.append((torch.stack(losses), made.images.pyramid.data.clone(), made.optimiser.exp_avg_sq.clone()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def run_out(backbone, when, most):
    """A backbone that runs out of memory at call numbers ``when``, and always with more than ``most`` views."""
    calls = itertools.count()

    def run(views):
        if next(calls) in when or len(views) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backbone.model(views)

    return dataclasses.replace(backbone, run=run)


@pytest.mark.parametrize("when", [(), (0,), (1,), (2,), (3,), (4,), (0, 3)], ids=str)
@pytest.mark.parametrize("most", [3, 100])
def test_out_of_memory_loses_no_step(backbone, statistics, when, most):
    plain = distiller(backbone, statistics, Execution(12), ipc=3)
    limited = distiller(run_out(backbone, when, most), statistics, Execution(6), ipc=3)
    for _ in range(2):
        assert abs(plain.step() - limited.step()) < 1e-5
    assert limited.micro_batch <= min(most, 6 if not when else 3)
    difference = (limited.images.pyramid - plain.images.pyramid).abs()
    assert difference.median() < 1e-6
    assert difference.max() < 0.05  # Adam's first steps follow signs: gradients of rounding size may go either way


def test_out_of_memory_with_one_image_is_a_clear_error(backbone, statistics):
    made = distiller(run_out(backbone, (), 0), statistics, Execution(2))
    before = made.images.pyramid.data.clone()
    with pytest.raises(StepFailed, match="single image") as caught:
        made.step()
    assert not caught.value.torn
    assert torch.equal(made.images.pyramid.data, before)
    assert made.steps_done == 0


def test_out_of_memory_of_the_loss_frees_the_graph_first(backbone, statistics):
    made = distiller(backbone, statistics, Execution(2))
    _, expected = gradient_of_step(distiller(backbone, statistics, Execution(2)))
    loss, failures = made.objective.loss, iter([True])

    alive = []

    def short_of_memory(*arguments):
        gc.collect()
        alive.append(sum(type(thing) is MicroBatch for thing in gc.get_objects()))
        if next(failures, False):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return loss(*arguments)

    made.objective.loss = short_of_memory
    _, gradient = gradient_of_step(made)
    assert torch.equal(gradient, expected)
    assert alive == [1, 0]  # the last micro-batch, given up for the second try


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_gradient_that_is_not_finite_stops_the_run(backbone, statistics, micro_batch):
    made = distiller(backbone, statistics, Execution(micro_batch))
    made.step()
    before = made.images.pyramid.data.clone()
    loss = made.objective.loss
    made.objective.loss = lambda features, labels, step: loss(features * float("nan"), labels, step)
    with pytest.raises(StepFailed, match="loss became nan") as caught:
        made.step()
    assert not caught.value.torn
    assert torch.equal(made.images.pyramid.data, before)
    made.objective.loss = loss
    assert made.step().isfinite()


class _Spoil(torch.autograd.Function):
    """The identity, with a gradient of ``value`` in one row."""

    @staticmethod
    def forward(ctx, features, where, value):
        ctx.where, ctx.value = where, value
        return features.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.where] = ctx.value
        return grad, None, None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_bad_gradient_says_whether_anything_was_updated(backbone, statistics, micro_batch, where, value):
    """1e25 is finite, but its square, which Adam keeps, isn't."""
    made = distiller(backbone, statistics, Execution(micro_batch))
    made.step()
    state = [tensor.clone() for tensor in made.optimiser.state]
    loss = made.objective.loss
    made.objective.loss = lambda features, labels, step: loss(_Spoil.apply(features, where, value), labels, step)
    with pytest.raises(StepFailed, match="gradient became nan or infinite") as caught:
        made.step()
    first = (4 // micro_batch - 1) * micro_batch  # the last micro-batch is the first to be updated
    untouched = where >= first
    assert caught.value.torn == (not untouched)
    assert all(torch.equal(*pair) for pair in zip(state, made.optimiser.state, strict=True)) == untouched
    assert all(tensor.isfinite().all() for tensor in made.optimiser.state)


def test_no_room_for_the_loss_is_a_clear_error(backbone, statistics):
    made = distiller(backbone, statistics, Execution(2))

    def never(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made.objective.loss = never
    with pytest.raises(StepFailed, match="before any image was updated") as caught:
        made.step()
    assert not caught.value.torn


def test_a_resumed_run_keeps_a_halved_micro_batch(tmp_path, backbone, statistics):
    config = DistillConfig.paper(steps=2, ipc=2)
    limited = run_out(backbone, (), 3)
    first = make_distiller(config, limited, None, statistics, execution=Execution(6))
    assert first.run(tmp_path, progress=False)["micro_batch"] == 3
    longer = dataclasses.replace(config, steps=3)
    for asked, used in ((6, 3), ("auto", 3), (4, 4)):
        again = make_distiller(longer, backbone, None, statistics, execution=Execution(asked))
        again.restore(tmp_path / "checkpoint.safetensors")
        assert again.micro_batch == used


def test_what_cannot_be_predicted_runs_all_the_same(backbone, statistics, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no fake for this")

    monkeypatch.setattr("sfm_fast.distill.plan.predict_step", fail)
    made = distiller(backbone, statistics, ipc=2)
    with pytest.warns(RuntimeWarning, match="can't be predicted"):
        assert made.micro_batch == 8


def test_a_resumed_run_keeps_its_micro_batch(tmp_path, backbone, statistics):
    options = {"steps": 6, "ipc": 2}

    def run(folder, steps, execution, resume=False):
        made = make_distiller(
            DistillConfig.paper(**options | {"steps": steps}), backbone, None, statistics, execution=execution
        )  # fmt: skip
        return made.run(folder, resume=resume, progress=False)

    run(tmp_path / "whole", 6, Execution(3))
    run(tmp_path / "parts", 3, Execution(3))
    assert run(tmp_path / "parts", 6, Execution("auto"), resume=True)["micro_batch"] == 3
    one, two = (SyntheticSet.load(tmp_path / name) for name in ("whole", "parts"))
    assert torch.equal(one.images, two.images)
    fresh = make_distiller(DistillConfig.paper(**options), backbone, None, statistics, execution=Execution(5))
    checkpoint = tmp_path / "whole" / "checkpoint.safetensors"
    state = fresh.images, fresh.optimiser, fresh.average
    assert load_checkpoint(checkpoint, *state, fresh.config, fresh.provenance) == (6, 3, fresh.schedule, 3)


def test_auto_follows_the_budget(backbone, statistics):
    assert distiller(backbone, statistics, ipc=10).micro_batch == 40
    parameters = sum(parameter.nbytes for parameter in backbone.model.parameters())
    tight = distiller(backbone, statistics, Execution(memory_budget=parameters + 8_000_000), ipc=10)
    assert 3 <= tight.micro_batch < 20
    with pytest.raises(InputError, match="a step is predicted to take"):
        distiller(backbone, statistics, Execution(memory_budget=1), ipc=10).step()


def test_checkpointing_changes_nothing_but_memory(statistics):
    plain, sparing = load_backbone(), load_backbone(grad_checkpointing=True)
    expected, gradient = (gradient_of_step(distiller(model, statistics, Execution(2)))[1] for model in (plain, sparing))
    assert torch.equal(gradient, expected)


@pytest.mark.slow
def test_a_compiled_backbone(statistics):
    plain, compiled = load_backbone(), load_backbone(compile=True)
    _, expected = gradient_of_step(distiller(plain, statistics, Execution(4)))
    _, gradient = gradient_of_step(distiller(compiled, statistics, Execution(4)))
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8 * 10**9), ("750M", 750 * 10**6), ("6 GiB", 6 * 1024**3), ("1.5e9", 1_500_000_000), ("12", 12), (7, 7)],
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "8 XB", "-1GB", "0", "1.2.3G", "nan", "1e999"])
def test_amounts_that_are_none(text):
    with pytest.raises(InputError, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be 'auto' or at least 1, got 0"),
        ({"micro_batch": "most"}, "micro_batch must be"),
        ({"micro_batch": True}, "micro_batch must be"),
        ({"memory_budget": 0}, "memory_budget must be positive"),
        ({"state": "disk"}, "state must be one of"),
    ],
)
def test_bad_execution(options, message):
    with pytest.raises(InputError, match=message):
        Execution(**options)


def test_other_errors_are_not_out_of_memory(backbone, statistics):
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # what `ulimit -v` does to oneDNN
    assert is_out_of_memory(RuntimeError("Resource temporarily unavailable"))  # and to a new thread
    assert not is_out_of_memory(RuntimeError("shape mismatch"))

    def run(views):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        distiller(dataclasses.replace(backbone, run=run), statistics, Execution(2)).step()

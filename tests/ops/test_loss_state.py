"""What the losses remember between calls, and what happens to a module's constants: never a stale or silently changed result."""

from __future__ import annotations

import copy
import io

import definitions
import numpy as np
import pytest
import torch
from cases.losses import LOSS_CASES
from definitions import NAMES

import sfm_fast

GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])


def inputs():
    return next(case for case in LOSS_CASES if case.name == "labelled").make(torch.float32)


def test_labels_changed_in_place_are_looked_at_again():
    features, centers, _ = inputs()
    features, labels = features[:20], torch.arange(20) % 10
    module = sfm_fast.FlowAlignmentLoss(centers)
    first = module(features, labels)
    labels.copy_(labels.flip(0))
    assert not torch.equal(module(features, labels), first)
    labels[0] = 10
    with pytest.raises(sfm_fast.InputError, match=r"0\.\.9, got 0\.\.10"):
        module(features, labels)


def test_centers_changed_in_place_are_looked_at_again():
    features, centers, labels = inputs()
    first = sfm_fast.flow_alignment_loss(features, centers, labels)
    centers[0] += 1
    assert not torch.equal(sfm_fast.flow_alignment_loss(features, centers, labels), first)


def test_what_is_remembered_goes_with_the_tensor():
    from sfm_fast.losses.evaluate import constants_of

    before = len(constants_of._entries)
    centers = torch.randn(4, 3)
    sfm_fast.flow_alignment_loss(torch.randn(4, 3), centers)
    assert len(constants_of._entries) == before + 1
    del centers
    assert len(constants_of._entries) == before


def test_inference_mode():
    features, centers, labels = inputs()
    expected = sfm_fast.flow_alignment_loss(features, centers, labels)
    with torch.inference_mode():
        made_here = features.clone(), centers.clone(), labels.clone()
        assert torch.equal(sfm_fast.flow_alignment_loss(*made_here), expected)


def test_writes_that_autograd_does_not_count_are_seen():
    features, centers, _ = inputs()
    shared = np.arange(len(features)) % 10
    labels = torch.from_numpy(shared)
    first = sfm_fast.flow_alignment_loss(features, centers, labels)
    shared[:] = shared[::-1].copy()
    assert not torch.equal(sfm_fast.flow_alignment_loss(features, centers, labels), first)
    labels.data.fill_(3)
    with pytest.raises(sfm_fast.InputError, match="class 0 has no feature"):
        sfm_fast.flow_alignment_loss(features, centers, labels)
    centers.data.mul_(2).add_(torch.randn(64))
    expected = sfm_fast.flow_alignment_loss(features[:10], centers.clone())
    assert torch.equal(sfm_fast.flow_alignment_loss(features[:10], centers), expected)


def test_training_after_a_call_in_inference_mode():
    features, centers, labels = inputs()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair")
    with torch.inference_mode():
        made_here = sfm_fast.FlowAlignmentLoss(centers)
        for call in (module, made_here, lambda z, y: sfm_fast.flow_alignment_loss(z, centers, y)):
            call(features, labels)
    for call in (module, made_here, lambda z, y: sfm_fast.flow_alignment_loss(z, centers, y)):
        call(features.clone().requires_grad_(), labels).backward()


def test_traces_depend_on_the_labels_they_are_given():
    features, centers, labels = inputs()
    sfm_fast.flow_alignment_loss(features, centers, labels, backend="torch")  # what is remembered must not be baked in

    def loss(z, y):
        return sfm_fast.flow_alignment_loss(z, centers, y, backend="torch")

    traced = torch.jit.trace(loss, (features, labels), check_trace=False)
    torch.testing.assert_close(traced(features, labels.flip(0)), loss(features, labels.flip(0)))


def test_fake_tensors_are_not_remembered():
    from torch._subclasses.fake_tensor import FakeTensorMode

    features, centers, labels = inputs()
    expected = sfm_fast.flow_alignment_loss(features, centers.clone(), labels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sfm_fast.flow_alignment_loss(torch.empty(10, 64), centers)
    assert torch.equal(sfm_fast.flow_alignment_loss(features, centers, labels), expected)


def test_loading_one_module_leaves_the_others_alone():
    features, centers, labels = inputs()
    one, two = (sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=GROUPS) for _ in range(2))
    expected = one(features, labels)
    other = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=torch.arange(10))
    two.load_state_dict(other.state_dict())
    assert torch.equal(one(features, labels), expected)
    assert torch.equal(two(features, labels), other(features, labels))
    assert torch.equal(
        sfm_fast.flow_alignment_loss(features, centers, labels, alignment="pair", groups=GROUPS), expected
    )
    state = one.state_dict() | {"groups": torch.zeros(10, dtype=torch.int64)}
    with pytest.raises(sfm_fast.InputError, match="no flow is left"):
        two.load_state_dict(state)


@pytest.mark.parametrize("alignment", NAMES)
def test_casting_a_model_leaves_the_constants_alone(alignment):
    features, centers, labels = inputs()
    module = definitions.module(centers, alignment=alignment)
    expected = module(features, labels)
    parent = torch.nn.Sequential(torch.nn.Linear(2, 2), module)
    for cast in (parent.half, parent.bfloat16, parent.double, lambda: parent.to(torch.float16)):
        cast()
        assert torch.equal(module(features, labels), expected)


def test_module_from_meta_by_assignment():
    features, centers, labels = inputs()
    trained = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=GROUPS)
    module = sfm_fast.FlowAlignmentLoss(torch.randn(10, 64), alignment="pair", groups=torch.arange(10)).to("meta")
    module.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(module(features, labels), trained(features, labels))


def test_copies_and_files():
    features, centers, labels = inputs()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="class")
    module(features, labels)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = sfm_fast.FlowAlignmentLoss(torch.randn(10, 64), alignment="class")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(module), fresh):
        assert torch.equal(other(features, labels), module(features, labels))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("alignment", NAMES)
def test_strided_centers_and_groups(backend, alignment):
    features, centers, labels = inputs()
    groups = torch.stack([GROUPS, torch.arange(10)], 1)[:, 0] if alignment == "pair" else None
    strided = centers.t().contiguous().t()
    loss = definitions.loss(features, strided, labels, alignment=alignment, backend=backend, groups=groups)
    expected = definitions.loss(
        features, centers, labels, alignment=alignment, backend="torch", groups=None if groups is None else GROUPS
    )
    torch.testing.assert_close(loss, expected)


def naive_average(averaged, module, decay):
    """Of parameters and buffers, whatever their dtype."""
    for ours, theirs in zip(averaged.buffers(), module.buffers(), strict=True):
        ours.copy_(decay * ours + (1 - decay) * theirs)


def state_average(averaged, module, decay):
    """Written into the tensors of the state, as several training codes do."""
    state = module.state_dict()
    for name, value in averaged.state_dict().items():
        value.copy_(decay * value + (1 - decay) * state[name])


def mean_of_states(averaged, module, decay):
    states = averaged.state_dict(), module.state_dict()
    averaged.load_state_dict(
        {name: decay * value.double() + (1 - decay) * states[1][name].double() for name, value in states[0].items()}
    )


@pytest.mark.parametrize("alignment", NAMES)
@pytest.mark.parametrize("average", [naive_average, state_average, mean_of_states, "swa_utils"])
def test_averages_of_modules_keep_the_loss(average, alignment):
    features, centers, labels = inputs()
    module = definitions.module(centers, alignment=alignment, groups=GROUPS if alignment == "pair" else None)
    expected = module(features, labels)
    parent = torch.nn.Sequential(torch.nn.Linear(2, 2), module)
    if average == "swa_utils":
        averages = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        averaged = torch.optim.swa_utils.AveragedModel(parent, use_buffers=True, multi_avg_fn=averages)
        for _ in range(50):
            averaged.update_parameters(parent)
        found = averaged.module[1]
    else:
        found = copy.deepcopy(module)
        for _ in range(50):
            average(found, module, 0.9)
    torch.testing.assert_close(found(features, labels), expected, rtol=1e-6, atol=1e-7)
    if alignment == "pair":
        assert torch.equal(found.groups, GROUPS)
        assert int(found.pairs) == int(module.pairs)


def test_the_average_of_different_groups_is_refused():
    _, centers, _ = inputs()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=GROUPS)
    state = module.state_dict()
    with pytest.raises(sfm_fast.InputError, match="must be whole numbers"):
        module.load_state_dict(state | {"groups": (GROUPS.double() + torch.arange(10)) / 2})
    with pytest.raises(sfm_fast.InputError, match=r"must be a tensor \(10,\)"):
        module.load_state_dict(state | {"groups": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"Missing key.*groups"):
        module.load_state_dict({name: value for name, value in state.items() if name != "groups"})
    plain = sfm_fast.FlowAlignmentLoss(centers, alignment="pair")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*groups"):
        plain.load_state_dict(state)


def test_averages_of_other_centers_are_consistent():
    features, centers, labels = inputs()
    one, two = (sfm_fast.FlowAlignmentLoss(c) for c in (centers, centers + torch.randn(10, 64)))
    naive_average(one, two, 0.5)
    both = sfm_fast.FlowAlignmentLoss(one.shifted_centers + one.shift.double())
    torch.testing.assert_close(one(features, labels), both(features, labels), rtol=1e-5, atol=1e-6)


def test_pickled_modules():
    import pickle

    features, centers, labels = inputs()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=GROUPS)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(other(features, labels), module(features, labels))


def test_functional_call_takes_the_buffers_it_is_given():
    features, centers, labels = inputs()
    one, two = (sfm_fast.FlowAlignmentLoss(c) for c in (centers, centers + torch.randn(10, 64)))
    expected = one(features, labels)
    found = torch.func.functional_call(one, dict(two.named_buffers()), (features, labels))
    assert torch.equal(found, two(features, labels))
    assert torch.equal(one(features, labels), expected)
    gradient = torch.func.grad(lambda z: torch.func.functional_call(one, one.state_dict(), (z, labels)))(features)
    leaf = features.clone().requires_grad_()
    one(leaf, labels).backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_moved_and_loaded_in_inference_mode_and_trained_outside():
    features, centers, labels = inputs()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=GROUPS)
    fresh = sfm_fast.FlowAlignmentLoss(torch.randn(10, 64), alignment="pair", groups=torch.arange(10))
    with torch.inference_mode():
        module.double()
        state = {name: value.clone() for name, value in module.state_dict().items()}
        fresh.load_state_dict(state, assign=True)
    for other in (module, fresh):
        other(features.clone().requires_grad_(), labels).backward()
    assert torch.equal(fresh(features, labels), module(features, labels))


def test_statistics_cross_inference_mode_both_ways():
    features, _, labels = inputs()
    plain = sfm_fast.ClassStatistics(10, 64)
    plain.update(features, labels)
    with torch.inference_mode():
        made_here = sfm_fast.ClassStatistics(10, 64)
        made_here.update(features * 1, labels * 1)
        centers_from_here = made_here.centers
    made_here.update(features, labels)
    assert torch.equal(made_here.centers, plain.centers)
    outside = sfm_fast.ClassStatistics(10, 64)
    outside.update(features, labels)
    with torch.inference_mode():
        outside.update(features * 1, labels * 1)
    assert torch.equal(outside.counts, 2 * plain.counts)
    for loss in (
        sfm_fast.FlowAlignmentLoss(centers_from_here),
        lambda z, y: sfm_fast.flow_alignment_loss(z, centers_from_here, y),
    ):
        loss(features.clone().requires_grad_(), labels).backward()


def test_emptied_and_loaded_again():
    features, centers, labels = inputs()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=GROUPS)
    state = copy.deepcopy(module.state_dict())
    expected = module(features, labels)
    module.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(features, labels), expected)


def test_on_the_meta_device():
    module = sfm_fast.FlowAlignmentLoss(torch.empty(10, 64, device="meta"), alignment="pair", groups=GROUPS.to("meta"))
    assert module(torch.empty(10, 64, device="meta")).shape == ()


def test_buffers_broadcast_by_ddp(tmp_path):
    features, centers, labels = inputs()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=GROUPS)
    expected = module(features, labels)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = torch.nn.ModuleDict({"net": torch.nn.Linear(64, 64, bias=False), "loss": module})
        torch.nn.init.eye_(model["net"].weight)
        model.forward = lambda z, y: model["loss"](model["net"](z), y)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            loss = parallel(features, labels)
            torch.testing.assert_close(loss, expected)
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(module.groups, GROUPS)


def test_buffers_that_get_other_storage():
    features, centers, labels = inputs()
    one, two = (sfm_fast.FlowAlignmentLoss(c, alignment="pair") for c in (centers, centers + torch.randn(10, 64)))
    for ours, theirs in zip(one.buffers(), two.buffers(), strict=True):
        ours.data = theirs.data.clone()
    assert torch.equal(one(features, labels), two(features, labels))


def test_groups_that_are_written_to():
    features, centers, labels = inputs()
    other = torch.arange(10) % 3
    expected = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=other)(features, labels)
    for change in (lambda m: m.groups.copy_(other), lambda m: setattr(m, "groups", other.clone())):
        module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", groups=GROUPS)
        module(features, labels)
        change(module)
        assert torch.equal(module(features, labels), expected)


@pytest.mark.parametrize("alignment", NAMES)
def test_copied_in_inference_mode_and_trained_outside(alignment):
    features, centers, labels = inputs()
    module = definitions.module(centers, alignment=alignment, groups=GROUPS if alignment == "pair" else None)
    expected = module(features, labels)
    with torch.inference_mode():
        copied = copy.deepcopy(module)
        moved = copy.deepcopy(module).to(torch.float64)
    for other in (copied, moved):
        leaf = features.clone().requires_grad_()
        loss = other(leaf, labels)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)

"""What the losses remember between calls, and what happens to a module's constants: never a stale or silently changed result."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

import sfm_fast
from sfm_fast.ops.backends import ALIGNMENTS
from sfm_fast.testing.cases import LOSS_CASES

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
    from sfm_fast.ops.losses import constants_of

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


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_casting_a_model_leaves_the_constants_alone(alignment):
    features, centers, labels = inputs()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment=alignment)
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
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_strided_centers_and_groups(backend, alignment):
    features, centers, labels = inputs()
    groups = torch.stack([GROUPS, torch.arange(10)], 1)[:, 0] if alignment == "pair" else None
    strided = centers.t().contiguous().t()
    loss = sfm_fast.flow_alignment_loss(features, strided, labels, alignment=alignment, backend=backend, groups=groups)
    expected = sfm_fast.flow_alignment_loss(
        features, centers, labels, alignment=alignment, backend="torch", groups=None if groups is None else GROUPS
    )
    torch.testing.assert_close(loss, expected)

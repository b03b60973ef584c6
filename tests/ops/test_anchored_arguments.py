"""Anchored flows: bad arguments, what is remembered of centres and anchors, and the module's state."""

from __future__ import annotations

import copy
import functools
import io

import definitions
import numpy as np
import pytest
import torch
from test_anchored import labelled, normal

import sfm_fast
from sfm_fast.losses.evaluate import constants_of

# --- arguments ---------------------------------------------------------------------------------------------------------

POINT = torch.zeros(4)
BAD = {
    "list": (dict(anchor=[0.0] * 4), "anchor must be a float tensor, got a builtins.list"),
    "integers": (dict(anchor=POINT.long()), r"anchor must be a float tensor, got torch\.int64"),
    "shape": (dict(anchor=torch.zeros(1, 4)), r"anchor must be \(4,\) to fit centers, got \(1, 4\)"),
    "device": (dict(anchor=POINT.to("meta")), "anchor is on meta, centers on cpu; move one of them"),
    "grad": (dict(anchor=torch.zeros(4, requires_grad=True)), r"anchor must not require grad.*anchor\.detach\(\)"),
    "one class and no anchor": (dict(centers=torch.ones(1, 4)), "at least 2 classes, got 1"),
    "no class": (dict(centers=torch.ones(0, 4), anchor=POINT), "at least 1 class, got 0"),
    "negative weight": (dict(length_weight=-0.5), "length_weight must be a number from 0 to 1e30, got -0.5"),
    "nan": (dict(length_weight=float("nan")), "length_weight must be .*, got nan"),
    "infinity": (dict(length_weight=float("inf")), "length_weight must be .*, got inf"),
    "bool": (dict(length_weight=True), "length_weight must be .*, got True"),
    "delta 0": (dict(length_delta=0), "length_delta must be None or a number above 0 up to 1e30, got 0"),
    "delta nan": (dict(length_delta=float("nan")), "length_delta must be .*, got nan"),
    "delta True": (dict(length_delta=True), "length_delta must be .*, got True"),
    "text": (dict(length_weight="1"), "length_weight must be .*, got '1'"),
    "tensor": (dict(length_weight=torch.tensor(1.0)), r"length_weight must be .*, got tensor\(1"),
}


def function(**arguments):
    return sfm_fast.anchored_flow_loss(torch.ones(3, 4), **arguments)


def module_of(centers, anchor=None, **options):
    return sfm_fast.FlowAlignmentLoss(centers, alignment="anchored", anchor=anchor, **options)


@pytest.mark.parametrize("form", [function, module_of])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name, form):
    changes, message = BAD[name]
    with pytest.raises(sfm_fast.InputError, match=message):
        form(**({"centers": torch.ones(3, 4)} | changes))


def test_numpy_numbers_are_numbers():
    features, centers = torch.randn(3, 4), torch.randn(3, 4)
    expected = sfm_fast.anchored_flow_loss(features, centers, length_weight=0.5)
    for number in (np.float32(0.5), np.float16(0.5), np.float64(0.5)):
        assert sfm_fast.anchored_flow_loss(features, centers, length_weight=number) == expected
    for name in ("length_weight", "length_delta", "eps"):  # next to a float16 the limits would be infinity and 0
        for number in (np.float16("inf"), np.float16("nan"), np.float16(-1)):
            with pytest.raises(sfm_fast.InputError, match=f"{name} must be"):
                sfm_fast.anchored_flow_loss(features, centers, **{name: number})


@pytest.mark.parametrize("options", [dict(anchor=POINT), dict(length_weight=0.5), dict(length_delta=0.5)])
def test_other_alignments_take_neither(options):
    with pytest.raises(sfm_fast.InputError, match=r"alignment must be 'anchored' if .* is given, got 'class'"):
        sfm_fast.FlowAlignmentLoss(torch.ones(3, 4), alignment="class", **options)


def test_no_squared_error():
    centers = torch.ones(3, 4)
    for call in (
        lambda: sfm_fast.flow_alignment_loss(centers, centers, alignment="anchored", metric="mse"),
        lambda: sfm_fast.FlowAlignmentLoss(centers, alignment="anchored", metric="mse"),
        lambda: sfm_fast.explain(centers, alignment="anchored", metric="mse"),
    ):
        with pytest.raises(sfm_fast.InputError, match="metric must be 'cosine' for alignment 'anchored', got 'mse'"):
            call()
    assert sfm_fast.explain(centers, alignment="anchored").backend == "cpu"


# --- what is remembered and kept ---------------------------------------------------------------------------------------


def test_constants_are_remembered_for_both_tensors():
    features, centers, labels = labelled()
    anchor, other, before = centers.mean(0), normal(64), len(constants_of._entries)

    loss = functools.partial(sfm_fast.anchored_flow_loss, features, labels=labels)
    first, second = loss(centers, anchor=anchor), loss(centers, anchor=other)
    assert len(constants_of._entries) == before + 2
    assert constants_of(centers, "anchored", anchor) is constants_of(centers, "anchored", anchor)
    assert not torch.equal(first, second)
    other.copy_(anchor)
    assert torch.equal(loss(centers, anchor=other), first)
    other.data.mul_(2)
    assert torch.equal(loss(centers, anchor=other), loss(centers, anchor=2 * anchor))
    centers[0] += 1
    assert not torch.equal(loss(centers, anchor=anchor), first)
    del anchor
    assert len(constants_of._entries) == before + 1
    del centers
    assert len(constants_of._entries) == before


def test_an_anchor_of_inference_mode_and_in_compiled_code():
    features, centers, labels = labelled()
    anchor = centers.mean(0)
    expected = sfm_fast.anchored_flow_loss(features, centers, labels, anchor=anchor, length_weight=0.5)
    with torch.inference_mode():
        made_here = anchor * 1
    for _ in range(2):
        leaf = features.clone().requires_grad_()
        loss = sfm_fast.anchored_flow_loss(leaf, centers, labels, anchor=made_here, length_weight=0.5)
        loss.backward()
        assert torch.equal(loss, expected)

    @torch.compile(fullgraph=True)
    def compiled(features, labels, anchor):
        return sfm_fast.anchored_flow_loss(features, centers, labels, anchor=anchor, length_weight=0.5)

    torch.testing.assert_close(compiled(features, labels, anchor), expected)
    assert compiled(features, labels + 1, anchor).isnan()


def test_a_state_holds_the_anchor_and_loading_replaces_it():
    features, centers, labels = labelled()
    module = module_of(centers, definitions.anchor_of(centers), length_weight=0.5)
    state = module.state_dict()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "shift": (torch.float32, (64,)),
        "shifted_centers": (torch.float64, (10, 64)),
        "shifted_anchor": (torch.float64, (64,)),
    }
    assert "length_weight=0.5" in repr(module)
    assert "weight" not in repr(sfm_fast.FlowAlignmentLoss(centers))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    expected = module(features, labels)
    for assign in (False, True):
        other = module_of(normal(10, 64, seed=5), normal(64, seed=6), length_weight=0.5)
        other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        file.seek(0)
        assert torch.equal(other(features, labels), expected)
    meta = copy.deepcopy(other).to("meta").to_empty(device="cpu")
    meta.load_state_dict(state)
    assert torch.equal(meta(features, labels), expected)


def test_states_of_other_alignments_do_not_fit():
    centers = normal(10, 64)
    anchored, plain = module_of(centers), sfm_fast.FlowAlignmentLoss(centers, alignment="class")
    with pytest.raises(RuntimeError, match=r"Missing key.*shifted_anchor"):
        anchored.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*shifted_anchor"):
        plain.load_state_dict(anchored.state_dict())


def test_averages_of_other_anchors_are_consistent():
    features, centers, labels = labelled()
    anchors = centers.mean(0), centers.mean(0) + normal(64, seed=4)
    one, two = (module_of(centers, anchor) for anchor in anchors)
    for ours, theirs in zip(one.buffers(), two.buffers(), strict=True):
        ours.copy_((ours + theirs) / 2)
    expected = sfm_fast.anchored_flow_loss(features, centers, labels, anchor=(anchors[0] + anchors[1]) / 2)
    torch.testing.assert_close(one(features, labels), expected, rtol=1e-5, atol=1e-6)


def test_an_anchor_that_is_written_to_or_replaced_for_a_call():
    features, centers, labels = labelled()
    one, two = (module_of(centers, anchor) for anchor in (centers.mean(0), normal(64)))
    expected, other = one(features, labels), two(features, labels)
    given = torch.func.functional_call(one, dict(two.named_buffers()), (features, labels))
    assert torch.equal(given, other)
    assert torch.equal(one(features, labels), expected)
    one.shifted_anchor.add_(0.1)
    moved = sfm_fast.anchored_flow_loss(features, centers, labels, anchor=centers.double().mean(0) + 0.1)
    torch.testing.assert_close(one(features, labels), moved)


def test_moved_in_inference_mode_and_trained_outside():
    features, centers, labels = labelled()
    module = module_of(centers, centers.mean(0))
    expected = module(features, labels)
    with torch.inference_mode():
        made_here = module_of(centers, centers.mean(0))
        module.half()
    for other in (module, made_here):
        leaf = features.clone().requires_grad_()
        loss = other(leaf, labels)
        loss.backward()
        assert torch.equal(loss, expected)
        assert other.shifted_anchor.dtype == torch.float64

"""Whole steps on a real GPU: micro-batches, state on the host, real shortage of memory, predicted peaks. Skipped without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sfm_fast import ClassStatistics
from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.load import shape_of_backbone
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.distill.predict import predict_step

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.gpu_alone,  # of memory, all of it
]
CLASSES = 48


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def backbone(request) -> Backbone:
    """A ViT-S/14 at 224 px with random weights."""
    shape = shape_of_backbone("vit_small_patch14_dinov2", image_size=224, precision=request.param)
    torch.manual_seed(0)
    model = shape.model.to_empty(device="cuda")
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.normal_(std=0.05)
    return dataclasses.replace(shape, model=model, mean=shape.mean.cuda(), std=shape.std.cuda())


def distiller(backbone, micro_batch, state="device"):
    generator = torch.Generator().manual_seed(0)
    statistics = ClassStatistics(CLASSES, backbone.num_features)
    statistics.update(
        torch.randn(2 * CLASSES, backbone.num_features, generator=generator), torch.arange(2 * CLASSES) % CLASSES
    )
    execution = Execution(micro_batch, state=state)
    made = make_distiller(DistillConfig.paper(lr=0.02), backbone, None, statistics, execution=execution)
    made.grow_fully()
    return made


def test_micro_batches_and_the_host_take_the_same_steps(backbone):
    results = {}
    for micro_batch, state in ((CLASSES, "device"), (10, "device"), (10, "host")):
        made = distiller(backbone, micro_batch, state)
        losses = torch.stack([made.step() for _ in range(3)]).cpu()
        results[micro_batch, state] = losses, made.images.pyramid.data.cpu().clone()
    one_shot, parts, host = results.values()
    tolerance = 1e-4 if backbone.precision == "fp32" else 2e-2
    torch.testing.assert_close(parts[0], one_shot[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(host[0], parts[0], rtol=tolerance, atol=tolerance)
    assert (host[1] - parts[1]).abs().median() < 1e-3
    assert host[1].isfinite().all()


@pytest.mark.parametrize(("micro_batch", "state"), [(CLASSES, "device"), (12, "device"), (12, "host")])
def test_the_predicted_peak(backbone, micro_batch, state):
    torch.cuda.empty_cache()
    made = distiller(backbone, micro_batch, state)
    made.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made.step()
    measured = torch.cuda.max_memory_allocated() - before
    found = predict_step(made.config, backbone, CLASSES, 3, micro_batch, host_state=state == "host")
    standing = sum(found.by_category[name] for name in ("parameters", "pyramid", "adam"))
    # cuBLAS keeps its workspace once it has one; it is in ``before``.
    assert found.peak_bytes - standing == pytest.approx(measured, rel=0.1)


def test_a_real_shortage_of_memory_loses_no_step(backbone):
    plain = distiller(backbone, 6)
    expected = torch.stack([plain.step() for _ in range(2)])
    del plain
    torch.cuda.empty_cache()
    limited = distiller(backbone, CLASSES)
    total = torch.cuda.get_device_properties(0).total_memory
    one_shot = predict_step(limited.config, backbone, CLASSES, 3, CLASSES, count_parameters=False).peak_bytes
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.6 * one_shot) / total)
        losses = torch.stack([limited.step() for _ in range(2)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert limited.micro_batch < CLASSES
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)

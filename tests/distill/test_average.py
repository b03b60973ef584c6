"""The mean of the last iterates: what it is, and that stopping changes nothing about it."""

from dataclasses import replace

import pytest
import torch

from sfm_fast.data.datasets import open_dataset
from sfm_fast.distill.average import IterateAverage
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig
from sfm_fast.distill.predict import predict_step
from sfm_fast.errors import InputError
from sfm_fast.features.compute import class_statistics
from sfm_fast.files import load_tensors, save_tensors
from sfm_fast.synthetic import SyntheticSet

CONFIG = DistillConfig.paper(method="sfm-decoupled", steps=8, grow_every=1, lr=0.05, average_last=0.5)


@pytest.fixture(scope="module")
def statistics(backbone):
    return class_statistics(open_dataset("embedded", "test"), backbone, progress=False)


def test_the_result_is_the_mean_of_the_last_pyramids(backbone, statistics):
    distiller = make_distiller(CONFIG, backbone, None, statistics)
    seen = []
    for _ in range(CONFIG.steps):
        distiller.step()
        seen.append(distiller.images.pyramid.detach().clone())
    # Power 2; the last level came at step 6, and started the mean anew.
    expected = seen[5]
    for step in (7, 8):
        expected = torch.lerp(expected, seen[step - 1], 3 / (step + 2))
    levels = distiller.images.split(expected)
    picture = sum(torch.nn.functional.interpolate(x, size=28, mode="bilinear") for x in levels)
    torch.testing.assert_close(distiller.result().images, torch.sigmoid(2 * picture))
    plain = make_distiller(replace(CONFIG, average_last=0.0), backbone, None, statistics)
    for _ in range(CONFIG.steps):
        plain.step()
    assert torch.equal(plain.images.pyramid, distiller.images.pyramid)  # the steps themselves are the same
    assert not torch.equal(plain.result().images, distiller.result().images)


def test_a_continued_run_has_the_same_mean(tmp_path, backbone, statistics):
    options = {"progress": False, "checkpoint_every": 1}
    config = replace(CONFIG, steps=12)
    make_distiller(config, backbone, None, statistics).run(tmp_path / "whole", **options)
    distiller = make_distiller(config, backbone, None, statistics)

    def stop(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distiller.run(tmp_path / "parts", on_step=stop, **options)
    make_distiller(config, backbone, None, statistics).run(tmp_path / "parts", resume=True, **options)
    whole, parts = (SyntheticSet.load(tmp_path / name).images for name in ("whole", "parts"))
    assert torch.equal(whole, parts)


def test_more_steps_continue_the_mean(tmp_path, backbone, statistics):
    make_distiller(CONFIG, backbone, None, statistics).run(tmp_path / "run", progress=False)
    longer = replace(CONFIG, steps=16)
    make_distiller(longer, backbone, None, statistics).run(tmp_path / "run", progress=False, resume=True)
    make_distiller(longer, backbone, None, statistics).run(tmp_path / "at_once", progress=False)
    assert torch.equal(*(SyntheticSet.load(tmp_path / name).images for name in ("run", "at_once")))


def test_a_damaged_mean_is_named(tmp_path, backbone, statistics):
    make_distiller(CONFIG, backbone, None, statistics).run(tmp_path / "run", progress=False)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors | {"average": tensors["average"][:, :-1].contiguous()}, metadata)
    with pytest.raises(InputError, match=r"damaged checkpoint \(average"):
        make_distiller(CONFIG, backbone, None, statistics).run(tmp_path / "run", progress=False, resume=True)


def test_its_memory_is_predicted(backbone):
    plain, averaged = (predict_step(replace(CONFIG, average_last=share), backbone, 10, 1) for share in (0.0, 0.25))
    floats = 10 * sum(side * side for side in (1, 2, 4, 8, 16, 28))
    assert averaged.by_category["pyramid"] - plain.by_category["pyramid"] == 4 * floats


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 1.0])
def test_its_steps_are_as_old_as_those_of_the_last_share(share):
    """The mean of the numbers 1 to t is t less their mean age, half the share of t."""
    mean, steps = IterateAverage(share), 4000
    for step in range(1, steps + 1):
        mean.add(torch.tensor([[float(step)]], dtype=torch.float64), step)
    assert mean.mean is not None
    assert mean.mean.item() == pytest.approx(steps * (1 - share / 2), rel=1e-3)


def test_shares():
    whole = IterateAverage(1.0)
    for step in range(1, 5):
        whole.add(torch.tensor([[float(step)]]), step)
    assert whole.mean is not None
    assert whole.mean.item() == pytest.approx(2.5)
    none = IterateAverage(0.0)
    none.add(torch.ones(1, 1), 4)
    assert none.mean is None
    with pytest.raises(InputError, match=r"average_last must be in \[0, 1\], got 1.5"):
        DistillConfig.paper(average_last=1.5)

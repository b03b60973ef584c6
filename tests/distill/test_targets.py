"""What class means are compared with: class means or discriminant centres, at class and at cluster level, and the anchor."""

from __future__ import annotations

import json

import pytest
import torch

from sfm_fast import ClassStatistics, DistillConfig, InputError, anchored_flow_loss, make_distiller
from sfm_fast.cli.main import main
from sfm_fast.distill.build import targets
from sfm_fast.synthetic import SyntheticSet

CLASSES = 4


@pytest.fixture(scope="module")
def statistics(backbone):
    generator = torch.Generator().manual_seed(0)
    found = ClassStatistics(CLASSES, backbone.num_features, clusters=3, covariance=True)
    labels = torch.arange(400) % CLASSES
    means = torch.randn(CLASSES, backbone.num_features, generator=generator)
    found.update(torch.randn(400, backbone.num_features, generator=generator) + means[labels] + 10, labels)
    found.provenance = {"channels": 1}
    return found


def test_class_level(statistics):
    assert torch.equal(targets(statistics, DistillConfig.paper()), statistics.centers)
    chosen = targets(statistics, DistillConfig.paper(centers="discriminant", shrinkage=2.0, center_scale=1.5))
    assert torch.equal(chosen, statistics.discriminant_centers(shrinkage=2.0, scale=1.5))
    assert torch.equal(
        targets(statistics, DistillConfig.paper(centers="discriminant")), statistics.discriminant_centers()
    )


def test_clusters_move_with_their_class(statistics):
    config = DistillConfig.paper(method="sfm-anchored", level="cluster", ipc=3, centers="discriminant")
    moved = targets(statistics, config) - statistics.cluster_centers
    expected = statistics.discriminant_centers() - statistics.centers
    torch.testing.assert_close(moved, expected.unsqueeze(1).expand(-1, 3, -1))


@pytest.mark.parametrize("level", ["class", "cluster"])
@pytest.mark.parametrize("views", [1, 2])
def test_the_anchor_is_the_real_mean(backbone, statistics, level, views):
    """Not the mean of the targets, which d moves."""
    config = DistillConfig.paper(
        method="sfm-anchored",
        centers="discriminant",
        level=level,
        ipc=3,
        views=views,
        length_weight=0.1,
        length_delta=0.2,
    )
    objective = make_distiller(config, backbone, None, statistics).objective
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3 * CLASSES * views, backbone.num_features, generator=generator)
    labels = torch.arange(CLASSES).repeat_interleave(3).repeat(views)
    rows = targets(statistics, config).flatten(0, -2)
    index = labels if level == "class" else torch.arange(3 * CLASSES).repeat(views)
    expected = anchored_flow_loss(
        features, rows, index, anchor=statistics.centers.mean(0), length_weight=0.1, length_delta=0.2, backend="torch"
    )
    torch.testing.assert_close(objective.loss(features, labels, 0), expected, rtol=1e-5, atol=1e-6)
    # A part of the terms, from their images alone.
    whole = features.view(views, -1, backbone.num_features)
    size = 3 if level == "class" else 1
    terms = CLASSES if level == "class" else 3 * CLASSES
    parts = [
        objective.terms(whole[:, i * size : (i + 2) * size].flatten(0, 1), labels, 0, range(i, i + 2))
        for i in range(0, terms, 2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_combined(backbone):
    plain = ClassStatistics(CLASSES, backbone.num_features)
    plain.update(torch.randn(40, backbone.num_features), torch.arange(40) % CLASSES)
    with pytest.raises(InputError, match="holds no covariance"):
        make_distiller(DistillConfig.paper(centers="discriminant"), backbone, None, plain)
    for options, message in (
        ({"method": "lgm", "centers": "discriminant"}, "centers must be 'means' for method 'lgm'"),
        ({"centers": "medians"}, "centers must be one of"),
        ({"shrinkage": -1.0}, "shrinkage must be in"),
        ({"center_scale": 0.0}, "center_scale must be in"),
        ({"length_weight": -0.1}, "length_weight must be in"),
        ({"length_delta": 0}, "length_delta must be in"),
        ({"shrinkage": 1.0}, "centers must be 'discriminant' or 'regression' if shrinkage is given"),
        ({"proximity": 1.0, "centers": "discriminant"}, "centers must be 'regression' if proximity is given"),
        ({"proximity": 0.0}, "proximity must be in"),
        ({"center_scale": 1.0, "method": "sfm-anchored"}, "centers must be 'discriminant' if center_scale is given"),
    ):
        with pytest.raises(InputError, match=message):
            DistillConfig.paper(**options)


def test_the_schedule_follows_steps_and_size():
    assert DistillConfig.paper().schedule(9) == (2e-3, 200)  # the papers' 5000 steps at 256 px
    assert DistillConfig.paper(steps=600).schedule(6) == (pytest.approx(10 / 600), 36)
    assert DistillConfig.paper(steps=60).schedule(6) == (0.02, 4)
    assert DistillConfig.paper(steps=2).schedule(6).grow_every == 1
    assert DistillConfig.paper(steps=600, lr=0.1, grow_every=7).schedule(6) == (0.1, 7)


def test_a_resumed_run_keeps_its_schedule(tmp_path, backbone, statistics):
    """Unless given, it would follow the new number of steps."""
    first = make_distiller(DistillConfig.paper(steps=100), backbone, None, statistics)
    for _ in range(7):
        first.step()
    first.save(tmp_path / "checkpoint.safetensors")
    longer = make_distiller(DistillConfig.paper(steps=5000), backbone, None, statistics)
    assert longer.schedule != first.schedule
    longer.restore(tmp_path / "checkpoint.safetensors")
    assert longer.schedule == first.schedule
    assert longer.optimiser.lr == first.schedule.lr == 0.02
    first.step(), longer.step()
    assert torch.equal(first.images.pyramid, longer.images.pyramid)


def test_from_the_command_line(tmp_path, capsys):
    stats, without = str(tmp_path / "stats.safetensors"), str(tmp_path / "without.safetensors")
    assert main(["stats", "--data", "embedded", "--out", stats, "--quiet"]) == 0
    assert main(["stats", "--data", "embedded", "--out", without, "--no-covariance", "--quiet"]) == 0
    assert ClassStatistics.load(stats).within_covariance is not None
    assert ClassStatistics.load(without).within_covariance is None
    words = ["--steps", "2", "--micro-batch", "5", "--quiet", "--out", str(tmp_path / "run")]
    anchored = ["distill", "--method", "sfm-anchored", "--centers", "discriminant", *words]
    assert main([*anchored, "--stats", without]) == 1
    assert "holds no covariance" in capsys.readouterr().err
    summary = str(tmp_path / "summary.json")
    assert main([*anchored, "--stats", stats, "--json", summary]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["schedule"] == {"lr": 0.01, "grow_every": 1}
    made = SyntheticSet.load(tmp_path / "run").metadata
    assert made["config"]["centers"] == "discriminant"
    assert main(["plan", "--backbone", "fashion_vit", *anchored[1:5], "--num-classes", "10", "--memory", "1GB"]) == 0
    assert "--centers discriminant" in capsys.readouterr().out.replace("level class ", "")

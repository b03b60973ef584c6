"""Cluster-level matching: each image of a class against one of the class's k-means centres."""

import argparse
import json

import pytest
import torch

from sfm_fast.backbones.load import load_backbone
from sfm_fast.cli.distill import add_method_arguments, method_config
from sfm_fast.cli.main import main
from sfm_fast.data.datasets import open_dataset
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig
from sfm_fast.distill.objectives import DecoupledFlowMatching, FlowMatching, center_of
from sfm_fast.errors import InputError
from sfm_fast.features.statistics import ClassStatistics

CLASSES, CLUSTERS, DIM = 4, 3, 6


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centres (C, K, D), features of two views (2 * C * K, D), labels as a run has them: image i has label i mod C."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, CLUSTERS, DIM, generator=generator, dtype=torch.float64)
    features = torch.randn(2 * CLASSES * CLUSTERS, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    return centers, features, (torch.arange(CLASSES * CLUSTERS) % CLASSES).repeat(2)


def by_slot(features: torch.Tensor) -> torch.Tensor:
    """Means over the two views, as (C, K, D): image k of class c is number k * C + c."""
    return features.view(2, CLUSTERS, CLASSES, DIM).mean(0).transpose(0, 1)


def test_image_k_of_a_class_belongs_to_its_centre_k(batch) -> None:
    _, _, labels = batch
    rows = center_of(labels, CLUSTERS, views=2)
    assert rows[: CLASSES * CLUSTERS].view(CLUSTERS, CLASSES).tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert torch.equal(rows[: CLASSES * CLUSTERS], rows[CLASSES * CLUSTERS :])
    assert torch.equal(center_of(labels, 1, views=2), labels)
    assert center_of(torch.tensor([0, 0, 1, 1, 2, 2]), 2, views=1).tolist() == [0, 1, 2, 3, 4, 5]  # any order of labels


def test_decoupled_is_the_squared_distance_of_every_image_to_its_own_centre(batch) -> None:
    centers, features, labels = batch
    loss = DecoupledFlowMatching(centers, views=2).loss(features, labels, 0)
    torch.testing.assert_close(loss, (by_slot(features) - centers).square().mean())


def test_flows_within_a_class_are_left_out(batch) -> None:
    centers, features, labels = batch
    shown, total, count = by_slot(features), 0.0, 0
    for c in range(CLASSES):
        for d in range(CLASSES):
            for j in range(CLUSTERS):
                for k in range(CLUSTERS):
                    if c != d:
                        real, ours = centers[d, k] - centers[c, j], shown[d, k] - shown[c, j]
                        total, count = total + 1 - torch.cosine_similarity(real, ours, dim=0), count + 1
    loss = FlowMatching(centers, views=2, alignment="pair").loss(features, labels, 0)
    torch.testing.assert_close(loss, total / count)


@pytest.mark.parametrize(("method", "alignment"), [("sfm", "pair"), ("sfm-decoupled", "global")])
def test_a_run_comes_closer_to_the_clusters(method: str, alignment: str) -> None:
    config = DistillConfig.paper(
        method=method,
        level="cluster",
        alignment=alignment,
        ipc=2,
        steps=12,
        lr=0.05,
        grow_every=2,
        noise=False,
        min_area=0.9,
    )
    backbone, source = load_backbone(), open_dataset("embedded", "test")
    distiller = make_distiller(config, backbone, source, progress=False)
    losses = [float(distiller.step()) for _ in range(config.steps)]
    assert losses[-1] < 0.9 * losses[0]
    assert (
        make_distiller(config, backbone, source, progress=False).micro_batch == 20
    )  # predicted, hence of the right shapes


def test_statistics_must_hold_as_many_centres_as_images() -> None:
    backbone = load_backbone()
    found = ClassStatistics(2, backbone.num_features, clusters=2, device="cpu")
    found.update(torch.randn(40, backbone.num_features), torch.arange(40) % 2)
    config = DistillConfig.paper(method="sfm-decoupled", level="cluster", ipc=3)
    with pytest.raises(InputError, match="ipc 3 needs 3 k-means centres per class, but the statistics hold 2"):
        make_distiller(config, backbone, None, found)
    plain = ClassStatistics(2, backbone.num_features)
    plain.update(torch.randn(4, backbone.num_features), torch.arange(4) % 2)
    config = DistillConfig.paper(method="sfm-decoupled", level="cluster")
    with pytest.raises(InputError, match="--clusters 1"):
        make_distiller(config, backbone, None, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lgm"}, "level 'cluster' is for sfm, sfm-decoupled and sfm-anchored"),
        ({"method": "sfm-decoupled", "alpha": 0.5}, "alpha must be 1 with .* got 0.5"),
        ({"method": "sfm"}, "alignment must be 'pair' .* got 'global'"),
        ({"method": "sfm-decoupled", "level": "image"}, "level must be one of"),
    ],
)
def test_what_clusters_can_not_do(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillConfig.paper(**{"level": "cluster", **options})


def test_the_command_distils_from_statistics_with_clusters(tmp_path) -> None:
    stats, out = str(tmp_path / "stats.safetensors"), tmp_path / "run"
    main(["stats", "--data", "embedded", "--split", "test", "--clusters", "2", "--out", stats, "--quiet"])
    main(
        [
            "distill",
            "--method",
            "sfm-decoupled",
            "--level",
            "cluster",
            "--ipc",
            "2",
            "--steps",
            "2",
            "--stats",
            stats,
            "--out",
            str(out),
            "--quiet",
            "--json",
            str(tmp_path / "run.json"),
        ]
    )
    assert "cluster" in json.dumps(json.loads((tmp_path / "run.json").read_text()))
    assert (out / "synthetic.safetensors").exists()


def test_what_follows_from_the_options_given() -> None:
    parser = argparse.ArgumentParser()
    add_method_arguments(parser)

    def config(*options: str) -> DistillConfig:
        return method_config(parser.parse_args(options))

    assert config() == DistillConfig()
    one, many = config("--steps", "7"), config("--ipc", "3")
    assert (one.method, one.level, one.centers, one.init) == ("sfm-anchored", "class", "regression", "auto")
    assert (one.noise, one.average_last, one.length_weight, one.length_delta) == (False, 0.25, 2.0, 0.1)
    assert (many.level, many.centers) == ("cluster", "regression")
    assert config("--ipc", "3", "--level", "class").centers == "regression"
    assert config("--ipc", "3", "--centers", "discriminant").level == "cluster"
    assert config("--ipc", "3", "--center-scale", "5").centers == "discriminant"
    assert config("--ipc", "3", "--method", "sfm").level == "class"
    assert config("--method", "sfm-decoupled", "--ipc", "2").level == "cluster"
    assert config("--method", "sfm-decoupled", "--ipc", "2", "--alpha", "0.5").level == "class"
    assert config("--noise", "--min-area", "0.9") == DistillConfig(noise=True, min_area=0.9)
    # LGM's are its paper's, with or without --paper.
    lgm = config("--method", "lgm", "--steps", "9")
    assert lgm == DistillConfig.paper(method="lgm", steps=9)
    assert (lgm.init, lgm.noise, lgm.min_area, lgm.average_last) == ("noise", True, 0.08, 0.0)
    paper = config("--paper", "--steps", "9")
    assert paper == DistillConfig.paper(steps=9)
    assert (paper.method, paper.level, paper.centers, paper.init) == ("sfm", "class", "means", "noise")
    assert config("--paper").steps == 5000
    assert config("--paper", "--min-area", "0.5", "--no-noise") == DistillConfig.paper(min_area=0.5, noise=False)
    with pytest.raises(InputError, match="--shrinkage must be in"):
        config("--shrinkage", "-1")
    for wrong, message in (
        ({"method": "best"}, "method must be one of"),
        ({"method": ["x"]}, "method must be one of"),
        ({"ipc": "2"}, "ipc must be"),
    ):
        with pytest.raises(InputError, match=message):
            DistillConfig(**wrong)


def test_the_plan_says_what_was_given_and_has_lgm_beside_it(tmp_path, capsys) -> None:
    options = ["--backbone", "fashion_vit", "--num-classes", "4", "--ipc", "2"]
    given = ["--method", "sfm-decoupled", "--lr", "0.05", "--noise", "--centers", "discriminant"]
    main(["plan", *options, *given, "--json", str(tmp_path / "plan.json")])
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"sfm", "lgm"}
    advice = capsys.readouterr().out.strip().splitlines()[-1]
    for word in (" ".join(given[:2]), "--lr 0.05", "--noise", "--centers discriminant", "--ipc 2"):
        assert word in advice
    for name in ("--level", "--min-area", "--average-last", "--init", "--steps"):
        assert name not in advice

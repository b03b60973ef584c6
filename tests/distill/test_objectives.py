"""Methods: what they declare is true, and one class is all that a new one takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig
from sfm_fast.distill.objectives import METHODS, Given
from sfm_fast.options import options_of


@pytest.fixture(scope="module")
def given():
    centers = torch.randn(4, 192, generator=torch.Generator().manual_seed(0))
    return Given(load_backbone(), 4, 1, centers)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sfm"},
        {"method": "sfm-decoupled"},
        {"method": "sfm-decoupled", "alpha": 0.5},
        {"method": "sfm-anchored"},
    ],
)
def test_a_separable_loss_is_a_sum_over_classes(given, options):
    """The gradient of a class's features doesn't change with those of the others, exactly where the method says so."""
    objective = METHODS[options["method"]].build(DistillConfig.paper(**options), given)
    features = torch.randn(4, 192, generator=torch.Generator().manual_seed(1))
    other = features.clone()
    other[1:] += 1

    def first(values):
        leaf = values.clone().requires_grad_()
        return torch.autograd.grad(objective.loss(leaf, torch.arange(4), 0), leaf)[0][0]

    assert torch.allclose(first(features), first(other), atol=1e-9) == objective.separable


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_options_that_the_configuration_has(name):
    kind = METHODS[name]
    assert kind.about
    assert options_of(kind.options).keys() <= options_of(DistillConfig).keys()
    assert DistillConfig.paper(method=name).views_per_step == kind.usual_views


NEW = """
import sys
from dataclasses import dataclass

import torch
from sfm_fast.distill.objectives import Objective, method
from sfm_fast.options import option


@dataclass(frozen=True)
class StretchOptions:
    stretch: float = option(1.0, "of stretched: factor of the centres", within="(0, 10]")


@method
class Stretched(Objective):
    name, about, options, usual_views, separable, levels = "stretched", "means to stretched centres", StretchOptions, 2, True, ("class",)

    def __init__(self, centers, views, stretch):
        self.centers, self.views = stretch * centers, views

    @classmethod
    def build(cls, config, given):
        return cls(given.centers, config.views_per_step, config.stretch)

    def loss(self, features, labels, step):
        return (features - self.centers[labels]).square().mean()


from sfm_fast.cli.main import main

torch.set_num_threads(1)
words = ["--method", "stretched", "--stretch", "2", "--quiet"]
assert main(["distill", *words, "--steps", "3", "--grow-every", "1", "--out", sys.argv[1]]) == 0
assert main(["plan", "--num-classes", "10", "--method", "stretched", "--memory", "1GB", "--json", sys.argv[1] + "/plan.json"]) == 0
assert main(["distill", "--method", "stretched", "--stretch", "11"]) == 1
assert main(["distill", "--method", "stretched", "--level", "cluster"]) == 1
"""


def test_a_new_method_is_one_class(tmp_path):
    """Options on the command line, views, prediction of memory, a run, and its errors follow from what it declares."""
    done = subprocess.run([sys.executable, "-c", NEW, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stretched: 3 steps" in done.stdout
    assert "--stretch must be in (0, 10], got 11.0" in done.stderr
    assert "level 'cluster' is for sfm, sfm-decoupled and sfm-anchored, not for stretched" in done.stderr
    from sfm_fast.synthetic import SyntheticSet

    config = SyntheticSet.load(tmp_path / "run").metadata["config"]
    assert (config["method"], config["stretch"]) == ("stretched", 2.0)


def test_stock_leaves_a_shared_backbone_frozen():
    """Its parameters require gradients during its own steps alone, and keep none: another method may use the same backbone."""
    backbone, source = load_backbone(), open_dataset("embedded", "train")
    during = []
    run = dataclasses.replace(backbone, run=lambda x: during.append(requiring(backbone)) or backbone.model(x))
    config = DistillConfig.paper(method="lgm", lgm_variant="stock", views=1, steps=1)
    distiller = make_distiller(config, run, source)
    assert not requiring(backbone)
    distiller.step()
    assert all(during)
    assert not requiring(backbone)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def requiring(backbone):
    return any(parameter.requires_grad for parameter in backbone.model.parameters())

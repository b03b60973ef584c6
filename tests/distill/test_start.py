"""Runs that start from real images: which are taken, that they are what is shown first, and where they can't be had."""

from __future__ import annotations

import pytest
import torch

from sfm_fast import InputError, from_iterable
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ArraySource
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.distill.images import SyntheticImages
from sfm_fast.distill.start import PER_IMAGE, RealStart
from sfm_fast.features.compute import class_statistics
from sfm_fast.reference.render import unrender
from sfm_fast.synthetic import SyntheticSet


@pytest.fixture(scope="module")
def source():
    return open_dataset("embedded", "train")


@pytest.fixture(scope="module")
def statistics(source, backbone):
    return class_statistics(source, backbone, clusters=3, covariance=True, progress=False)


class Watched(ArraySource):
    """Remembers which images were read."""

    def take(self, indices, transform):
        self.read.extend(indices)
        return super().take(indices, transform)


def watched(source):
    found = source.subset(list(range(len(source))), source.name)
    found.__class__ = Watched
    found.read = []
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_images_look_like_what_they_start_from(channels):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(5, channels, 12, 12, generator=generator)
    images = SyntheticImages(5, channels, 12)
    images.start_from(pictures)
    assert images.fully_grown
    torch.testing.assert_close(images.pictures(), pictures.clamp(0.02, 0.98), atol=2e-6, rtol=0)
    assert unrender(torch.tensor([[[[0.0, 1.0, 0.5]]]])).isfinite().all()


@pytest.mark.parametrize("ipc", [1, 3])
def test_the_nearest_of_those_looked_at_are_taken(source, statistics, backbone, ipc):
    seen = watched(source)
    config = DistillConfig(ipc=ipc, steps=1, seed=5)
    made = make_distiller(config, backbone, seen, statistics, execution=Execution(30))
    pictures, read = made._start(), list(seen.read)
    assert pictures.shape == (10 * ipc, 1, 28, 28)
    images, labels = source.images.float().div(255), source.labels
    flat = images.view(len(images), -1)
    taken = [int((flat - one.flatten()).abs().amax(1).argmin()) for one in pictures]
    assert labels[taken].tolist() == [label for label in range(10) for _ in range(ipc)]
    assert len(set(taken)) == 10 * ipc
    assert len(set(read)) < 0.5 * len(source) or ipc > 1
    looked = made._start._looked_at()[2].tolist()
    centers = statistics.centers.unsqueeze(1) if ipc == 1 else statistics.cluster_centers
    features = backbone.features(images[looked].view(-1, 1, 28, 28)).double()
    for label in range(10):
        rows = [place for place, index in enumerate(looked) if labels[index] == label]
        assert len(rows) >= PER_IMAGE
        distance = torch.cdist(centers[label], features[rows])
        mine = [looked[rows[column]] for column in distance.argmin(1).tolist()]
        # The nearest to some centre is always taken; with several, one image may be the nearest to two.
        assert mine[int(distance.amin(1).argmin())] in taken


def test_the_first_step_starts_from_them_and_the_seed_chooses(source, statistics, backbone):
    def start(seed):
        return make_distiller(DistillConfig(steps=1, seed=seed), backbone, source, statistics)._start()

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    made = make_distiller(DistillConfig(steps=1), backbone, source, statistics)
    assert made.config.init == "real"
    assert made.schedule.lr == 0.01
    made.step()
    moved = (made.images.pictures() - start(0)).abs()
    assert moved.max() < 0.06  # a step of Adam, and the margin of black and white
    assert make_distiller(DistillConfig(), backbone, source, statistics).schedule.lr == 0.005


def test_a_resumed_run_is_the_same_and_reads_no_start_again(tmp_path, source, statistics, backbone):
    def run(folder, steps, resume=False):
        seen = watched(source)
        made = make_distiller(DistillConfig(steps=steps, lr=0.01), backbone, seen, statistics)
        made.run(tmp_path / folder, resume=resume, progress=False)
        return made.images.pyramid.data, len(seen.read)

    whole, read = run("whole", 4)
    assert read > 0
    run("parts", 2)
    again, read = run("parts", 4, resume=True)
    assert torch.equal(again, whole)
    assert read == 0
    assert SyntheticSet.load(tmp_path / "parts").metadata["config"]["init"] == "real"
    with pytest.raises(InputError, match="the run has other options \\(init was 'real', now 'noise'\\)"):
        make_distiller(DistillConfig(steps=5, lr=0.01), backbone, None, statistics).run(
            tmp_path / "parts", resume=True, progress=False
        )


def test_several_backbones_agree_on_the_nearest(source, statistics, backbone):
    other = load_backbone("fashion_cnn")
    known = class_statistics(source, other, covariance=True, progress=False)
    centers = [statistics.centers, known.centers]
    start = RealStart(source, [backbone, other], centers, 1, 1, 28, 0)
    pictures, looked = start(), start._looked_at()[2].tolist()
    images, labels = source.images.float().div(255), source.labels
    for label in range(10):
        rows = [index for index in looked if labels[index] == label]
        total = torch.zeros(len(rows), dtype=torch.float64)
        for model, its in zip((backbone, other), centers, strict=True):
            apart = (model.features(images[rows].view(-1, 1, 28, 28)).double() - its[label]).square().sum(1)
            total += apart / apart.mean()
        assert torch.equal(pictures[label, 0], images[rows[int(total.argmin())]].view(28, 28))


def test_lgm_starts_from_the_nearest_to_the_mean_of_those_looked_at(source, backbone):
    config = DistillConfig.paper(method="lgm", init="real", views=1, steps=1)
    made = make_distiller(config, backbone, source)
    assert made._start().shape == (10, 1, 28, 28)
    assert made.step().isfinite()


def test_few_images_of_a_class_are_used_again(backbone):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(9, 28, 28, generator=generator).numpy()
    pairs = [(pixels[i], 0 if i < 7 else 1) for i in range(9)]
    some = from_iterable(pairs, class_names=["many", "few"], channels=1)
    pictures = RealStart(some, [backbone], [None], 4, 1, 28, 0)()
    assert len({tuple(one.flatten().tolist()) for one in pictures[:4]}) == 4
    assert len({tuple(one.flatten().tolist()) for one in pictures[4:]}) == 2


def test_without_a_data_set(statistics, backbone):
    assert make_distiller(DistillConfig(), backbone, None, statistics).config.init == "noise"
    with pytest.raises(InputError, match="init must be 'noise' without a data set"):
        make_distiller(DistillConfig(init="real"), backbone, None, statistics)
    with pytest.raises(InputError, match="init must be one of"):
        DistillConfig(init="zeros")


def test_a_generator_is_read_once(backbone):
    items = [(torch.rand(28, 28).numpy(), place % 2) for place in range(20)]
    config = DistillConfig(steps=1)
    for data, init in ((iter(items), "noise"), (items, "real")):
        made = make_distiller(config, backbone, from_iterable(data, class_names=["a", "b"], channels=1), progress=False)
        assert made.config.init == init
        assert made.step().isfinite()


def test_a_class_without_images_is_named(source, statistics, backbone):
    rows = (source.labels != 3).nonzero().flatten().tolist()
    start = RealStart(source.subset(rows, "no dresses"), [backbone], [statistics.centers], 1, 1, 28, 0)
    with pytest.raises(InputError, match=r"no dresses: class 3 .* has no images to start from"):
        start()


def test_measured_steps_stay_noise(source, statistics, backbone):
    made = make_distiller(DistillConfig(), backbone, source, statistics)
    made.grow_fully()
    made.step()
    assert made.images.pictures().std() > 0.1

"""Within-class covariance and discriminant centres: exactness, merging, files, the identity with the linear discriminant, hard cases."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from tests_data import labelled

from sfm_fast import ClassStatistics, InputError
from sfm_fast.features.discriminant import COSINE, choose_shrinkage, discriminant_centers
from sfm_fast.files import load_tensors, save_tensors

FAR = 1e4  # a common mean far larger than the spread, as of self-supervised features


def drawn(count, dim, classes, seed=0, apart=3.0):
    """Features (count, dim) float64 with correlated axes about class means, all far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, dim, dtype=torch.float64, generator=generator) @ torch.randn(
        dim, dim, dtype=torch.float64, generator=generator
    )
    labels = torch.arange(count) % classes
    means = apart * torch.randn(classes, dim, dtype=torch.float64, generator=generator)
    return mixed + means[labels] + FAR, labels


def filled(features, labels, classes, batch=1000, **options):
    statistics = ClassStatistics(classes, features.shape[1], covariance=True, **options)
    for part, part_labels in zip(features.split(batch), labels.split(batch), strict=True):
        statistics.update(part, part_labels)
    return statistics


def within(features, labels):
    """The definition, in float64."""
    classes = int(labels.max()) + 1
    means = torch.stack([features[labels == c].mean(0) for c in range(classes)])
    apart = features - means[labels]
    return apart.T @ apart / len(features)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_covariance_is_exact_next_to_a_large_common_mean(batch):
    features, labels = drawn(300, 6, 4)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    statistics = filled(features[order], labels[order], 4, batch)
    expected = within(features, labels)
    torch.testing.assert_close(statistics.within_covariance, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(statistics.within_covariance, statistics.within_covariance.T)
    assert torch.equal(statistics.centers, filled(features[order], labels[order], 4, 17).centers)
    features[0] += 100
    statistics.update(features[:1], labels[:1])  # the covariance follows
    more = torch.cat([drawn(300, 6, 4)[0], features[:1]])
    expected = within(more, torch.cat([labels, labels[:1]]))
    torch.testing.assert_close(statistics.within_covariance, expected, rtol=1e-6, atol=1e-5)


def test_statistics_without_it_take_none():
    features, labels = labelled(40, 3, 4)
    plain = ClassStatistics(4, 3)
    plain.update(features, labels)
    assert plain.within_covariance is None
    with pytest.raises(InputError, match="holds no covariance"):
        plain.discriminant_centers()
    with pytest.raises(InputError, match="these have none, other a covariance"):
        plain.merge(filled(features, labels, 4))
    empty = ClassStatistics(4, 3, covariance=True)
    with pytest.raises(InputError, match="class 0 has no images"):
        _ = empty.within_covariance


def test_merged_parts_are_one_pass():
    features, labels = drawn(200, 5, 4)
    whole, one, two = (
        filled(*part, 4) for part in ((features, labels), (features[:70], labels[:70]), (features[70:], labels[70:]))
    )
    nothing = ClassStatistics(4, 5, covariance=True)
    nothing.merge(one)
    nothing.merge(two)
    nothing.merge(ClassStatistics(4, 5, covariance=True))
    torch.testing.assert_close(nothing.within_covariance, whole.within_covariance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        two.within_covariance, filled(features[70:], labels[70:], 4).within_covariance
    )  # as it was


def _reduce(rank: int, world: int, address: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    features, labels = drawn(60, 3, 4)
    if rank == 0:  # one rank has no image
        statistics = ClassStatistics(4, 3, covariance=True)
    else:
        statistics = filled(features[rank - 1 :: world - 1], labels[rank - 1 :: world - 1], 4, 5)
    statistics.all_reduce()
    if rank == world - 1:
        statistics.save(out)
    torch.distributed.destroy_process_group()


def test_all_reduce_is_one_process(tmp_path):
    out = tmp_path / "stats.safetensors"
    mp.spawn(_reduce, (3, f"file://{tmp_path / 'rendezvous'}", str(out)), nprocs=3)
    whole = filled(*drawn(60, 3, 4), 4)
    torch.testing.assert_close(
        ClassStatistics.load(out).within_covariance, whole.within_covariance, rtol=1e-6, atol=1e-6
    )


def test_the_file_gives_the_same_targets(tmp_path):
    statistics = filled(*drawn(200, 5, 4), 4)
    statistics.save(tmp_path / "s.safetensors")
    loaded = ClassStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.within_covariance, statistics.within_covariance)
    assert torch.equal(loaded.discriminant_centers(), statistics.discriminant_centers())
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()
    features, labels = drawn(50, 5, 4, seed=3)
    for one in (loaded, statistics):
        one.update(features, labels)
    torch.testing.assert_close(loaded.within_covariance, statistics.within_covariance, rtol=1e-5, atol=1e-5)


COVARIANCE = torch.eye(4)


@pytest.mark.parametrize(
    "damaged",
    [
        COVARIANCE[:3],
        COVARIANCE.double(),
        COVARIANCE * float("nan"),
        COVARIANCE + torch.ones(4, 4).triu(1),
        COVARIANCE[None],
        torch.tensor([-1.0, 2.0, 2.0, 2.0]).diag(),
    ],
    ids=["narrow", "float64", "NaN", "not symmetric", "three dimensions", "negative variance"],
)
def test_damaged_files_are_named(tmp_path, damaged):
    path = tmp_path / "s.safetensors"
    filled(*drawn(20, 4, 2), 2).save(path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors | {"within_covariance": damaged}, metadata)
    with pytest.raises(InputError, match=r"s\.safetensors: damaged statistics \(within_covariance"):
        ClassStatistics.load(path)


def discriminant(features, centers, covariance, shrinkage):
    """Classes by the regularised linear discriminant of equal priors, the definition."""
    average = covariance.trace() / len(covariance)
    precision = torch.linalg.inv(covariance + shrinkage * average * torch.eye(len(covariance), dtype=torch.float64))
    apart, point = centers - centers.mean(0), features - centers.mean(0)
    scores = point @ (apart @ precision).T - ((apart @ precision) * apart).sum(1) / 2
    return scores.argmax(1)


def nearest(features, targets):
    return torch.cdist(features, targets, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (5, 20), (21, 20), (7, 3)])
@pytest.mark.parametrize(("shrinkage", "scale"), [(0.01, 1.0), (0.5, 1.3), (10.0, 0.5), ("auto", "auto")])
def test_the_nearest_target_is_the_linear_discriminant(classes, dim, shrinkage, scale):
    """Exactly where C - 1 <= D, also for features in float32 next to a common mean of 10^4; by least squares with more classes."""
    features, labels = drawn(4000, dim, classes, apart=1.0)
    statistics = filled(features, labels, classes)
    centers, covariance = statistics.centers, statistics.within_covariance.double()
    number = choose_shrinkage(centers, covariance) if shrinkage == "auto" else shrinkage
    expected = discriminant(features, centers, covariance, number)
    targets = statistics.discriminant_centers(shrinkage=shrinkage, scale=scale)
    assert targets.shape == (classes, dim)
    assert targets.dtype == torch.float64
    same = (nearest(features, targets) == expected).double().mean()
    assert same == 1 if classes - 1 <= dim else 0.6 < same < 1
    if classes - 1 <= dim:
        point = centers.mean(0)
        low = nearest((features - point).float(), (targets - point).float())
        assert (low == expected).double().mean() > 0.99
    plain = (nearest(features, centers) == labels).double().mean()
    assert (nearest(features, targets) == labels).double().mean() > plain - 0.02


def test_the_scale_is_the_distance_of_the_targets():
    statistics = filled(*drawn(400, 20, 5), 5)
    centers = statistics.centers
    length = (centers - centers.mean(0)).norm()
    for scale in (0.5, 1.0, 2.0):
        targets = statistics.discriminant_centers(shrinkage=1.0, scale=scale)
        torch.testing.assert_close(
            (targets - targets.mean(0)).norm() / length, torch.tensor(scale).double(), rtol=0.2, atol=0
        )
    far = statistics.discriminant_centers(shrinkage=1e6)
    torch.testing.assert_close(
        far, centers, rtol=0, atol=1e-4 * float(length)
    )  # without shape of the covariance: the means


def test_the_offset_is_the_shortest():
    """d has no part in directions that the equations leave free."""
    statistics = filled(*drawn(400, 20, 5), 5)
    targets = statistics.discriminant_centers(shrinkage=1.0)
    offset = targets.mean(0) - statistics.centers.mean(0)
    flows = targets - targets.mean(0)
    basis = torch.linalg.svd(flows, full_matrices=False)[2][:4]
    assert (offset - basis.T @ (basis @ offset)).norm() < 1e-9 * offset.norm()


def test_singular_covariances():
    features, labels = drawn(8, 20, 4)  # fewer images than features
    statistics = filled(features, labels, 4)
    expected = discriminant(features, statistics.centers, within(features, labels), 0.5)
    assert torch.equal(nearest(features, statistics.discriminant_centers(shrinkage=0.5)), expected)
    with pytest.raises(InputError, match=r"shrinkage must be larger for a singular covariance.* got 0"):
        statistics.discriminant_centers(shrinkage=0)
    with pytest.raises(InputError, match=r"shrinkage must be larger for a singular covariance.* got 1e-12"):
        statistics.discriminant_centers(shrinkage=1e-12)
    regular = filled(*drawn(400, 3, 4), 4)
    assert regular.discriminant_centers(shrinkage=0).isfinite().all()
    single = filled(features[:4], labels[:4], 4)  # one image of each class: the covariance is 0
    for shrinkage in ("auto", 0, 1.0):
        torch.testing.assert_close(single.discriminant_centers(shrinkage=shrinkage), single.centers, rtol=0, atol=1e-8)
    same = filled(features[:1].expand(4, -1), labels[:4], 4)
    torch.testing.assert_close(same.discriminant_centers(), same.centers)


def test_the_rule_bounds_the_angle_to_the_class_means():
    statistics = filled(*drawn(400, 20, 5), 5)
    apart = statistics.centers - statistics.centers.mean(0)
    targets = statistics.discriminant_centers()
    found = torch.cosine_similarity((targets - targets.mean(0)).flatten(), (apart - apart.mean(0)).flatten(), dim=0)
    torch.testing.assert_close(found, torch.tensor(COSINE).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("classes", "dim", "times", "scale", "shift"),
    [(100, 64, 1, 1.0, 0.0), (10, 5, 3, 1.0, 3.0), (10, 5, 1, 100.0, 6.0), (10, 64, 3, 1.0, FAR)],
)
def test_rounding_is_no_covariance(classes, dim, times, scale, shift, seed):
    """One image of each class, or the same one several times: the targets are the class means."""
    generator = torch.Generator().manual_seed(seed)
    features = (scale * torch.randn(classes, dim, dtype=torch.float64, generator=generator) + shift).repeat(times, 1)
    for dtype in (torch.float64, torch.float32):
        statistics = filled(features.to(dtype), torch.arange(classes).repeat(times), classes, 17)
        assert not statistics.within_covariance.any()
        torch.testing.assert_close(statistics.discriminant_centers(), statistics.centers, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize("unit", [1e-100, 1e-25, 1e25, 1e100])
def test_the_unit_of_features_makes_no_difference(tmp_path, unit):
    features, labels = drawn(200, 5, 4)
    features = features - FAR
    expected = filled(features, labels, 4)
    statistics = filled(features * unit, labels, 4)
    torch.testing.assert_close(
        statistics.within_covariance / unit / unit, expected.within_covariance, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        statistics.discriminant_centers() / unit, expected.discriminant_centers(), rtol=1e-5, atol=1e-5
    )
    statistics.save(tmp_path / "s.safetensors")
    loaded = ClassStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.discriminant_centers(), statistics.discriminant_centers())
    with pytest.raises(InputError, match=r"features must be at most 1e\+140 for a covariance"):
        statistics.update(torch.full((1, 5), 1e200, dtype=torch.float64), torch.tensor([0]))
    assert statistics.counts.sum() == 200


def test_what_is_returned_and_loaded_is_ones_own(tmp_path):
    features, labels = drawn(200, 5, 4)
    statistics = filled(features, labels, 4)
    before = statistics.discriminant_centers()
    statistics.within_covariance.zero_()
    assert torch.equal(statistics.discriminant_centers(), before)
    statistics.save(tmp_path / "s.safetensors")
    with torch.inference_mode():
        loaded = ClassStatistics.load(tmp_path / "s.safetensors")
    loaded.update(features, labels)
    loaded.merge(statistics)
    assert loaded.counts.sum() == 600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrinkage": -1}, "shrinkage must be 'auto' or a number from 0 up to 1e\\+06, got -1"),
        ({"shrinkage": float("nan")}, "shrinkage must be"),
        ({"shrinkage": True}, "shrinkage must be"),
        ({"shrinkage": "best"}, "shrinkage must be"),
        ({"scale": 0}, "scale must be 'auto' or a number above 0 and up to 1e\\+06, got 0"),
        ({"scale": float("inf")}, "scale must be"),
        ({"shrinkage": 1e300}, "shrinkage must be"),
        ({"shrinkage": 10**400}, "shrinkage must be"),
        ({"scale": [1.0]}, "scale must be"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        discriminant_centers(torch.randn(3, 4), torch.eye(4), **options)


@pytest.mark.parametrize("size", [0.1, 1.0, 1e6])
def test_a_feature_that_is_constant_within_each_class(tmp_path, size):
    """Its variance is a difference of equal sums, which rounding must not make negative."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 4, generator=generator)
    features[:, 1:3] = size * torch.randn(3, 2, generator=generator)[labels]
    statistics = filled(features, labels, 3, 7)
    statistics.save(tmp_path / "s.safetensors")
    loaded = ClassStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.within_covariance, statistics.within_covariance)
    assert (statistics.within_covariance.diagonal() >= 0).all()
    assert statistics.discriminant_centers().isfinite().all()


def test_a_matrix_with_negative_eigenvalues_is_no_covariance():
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(InputError, match="within must be a covariance, without negative eigenvalues, got -1 times"):
        discriminant_centers(torch.randn(3, 2), indefinite)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda statistics: ClassStatistics(2, 4, covariance="no"), "covariance must be True or False, got 'no'"),
        (lambda statistics: statistics.update([[1.0]], torch.tensor([0])), "features must be a tensor.*, got a builtins.list"),
        (lambda statistics: statistics.update(torch.ones(1, 4), [0]), "labels must be a tensor.*, got a builtins.list"),
        (lambda statistics: statistics.update(torch.ones(1, 4, device="meta"), torch.tensor([0])), "features must be a tensor that holds"),
        (lambda statistics: statistics.merge(None), "other must be ClassStatistics, got a builtins.NoneType"),
    ],
)  # fmt: skip
def test_arguments_of_other_kinds(call, message):
    statistics = filled(*drawn(20, 4, 2), 2)
    before = statistics.within_covariance
    with pytest.raises(InputError, match=message):
        call(statistics)
    assert statistics.counts.sum() == 20
    assert torch.equal(statistics.within_covariance, before)


def test_low_precision_and_devices_of_inputs():
    features, labels = drawn(400, 6, 4)
    statistics = filled((features - FAR).bfloat16(), labels, 4)
    assert statistics.discriminant_centers().isfinite().all()
    targets = discriminant_centers(statistics.centers.float(), statistics.within_covariance)
    assert targets.dtype == torch.float64

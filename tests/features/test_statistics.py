"""Class statistics: exactness, order, merging, files, errors."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_data import labelled

import sfm_fast
from sfm_fast import ClassStatistics, InputError


def filled(features, labels, classes, batch, **options):
    statistics = ClassStatistics(classes, features.shape[1], **options)
    for part, part_labels in zip(features.split(batch), labels.split(batch), strict=True):
        statistics.update(part, part_labels)
    return statistics


@settings(max_examples=25, deadline=None)
@given(count=st.integers(6, 60), dim=st.integers(1, 9), batch=st.integers(1, 60), seed=st.integers(0, 99))
def test_exact_whatever_the_order_and_batch(count, dim, batch, seed):
    features, labels = labelled(count, dim, 5, seed)
    features = (features + 1000).float()  # a common mean a thousand times the spread
    expected = torch.stack([features[labels == c].double().mean(0) for c in range(5)])
    order = torch.randperm(count)
    statistics = filled(features[order], labels[order], 5, batch)
    torch.testing.assert_close(statistics.centers, expected, rtol=1e-12, atol=0)
    assert torch.equal(statistics.counts, torch.bincount(labels, minlength=5))


def test_merge_equals_one_pass():
    features, labels = labelled(50, 4, 5)
    one, two = filled(features[:20], labels[:20], 5, 7), filled(features[20:], labels[20:], 5, 7)
    one.merge(two)
    torch.testing.assert_close(one.centers, filled(features, labels, 5, 50).centers, rtol=1e-13, atol=1e-13)
    with pytest.raises(InputError, match=r"other must have .* got 6 x"):
        one.merge(ClassStatistics(6, 4))


def _reduce(rank: int, world: int, address: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    features, labels = labelled(40, 3, 4)
    statistics = filled(features[rank::world], labels[rank::world], 4, 5)
    statistics.all_reduce()
    if rank == 0:
        statistics.save(out)
    torch.distributed.destroy_process_group()


def test_all_reduce_equals_one_process(tmp_path):
    out = tmp_path / "stats.safetensors"
    mp.spawn(_reduce, (2, f"file://{tmp_path / 'rendezvous'}", str(out)), nprocs=2)
    features, labels = labelled(40, 3, 4)
    torch.testing.assert_close(ClassStatistics.load(out).centers, filled(features, labels, 4, 40).centers)


def test_save_and_load(tmp_path):
    features, labels = labelled(50, 4, 5)
    statistics = filled(features, labels, 5, 50, class_names=list("abcde"))
    statistics.save(tmp_path / "s.safetensors", {"backbone": {"name": "x"}})
    loaded = ClassStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.centers, statistics.centers)
    assert torch.equal(loaded.counts, statistics.counts)
    assert loaded.class_names == list("abcde")
    assert loaded.provenance == {"backbone": {"name": "x"}}
    loaded.update(features, labels)
    assert loaded.counts.sum() == 100
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_clusters_find_the_groups():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([[[0.0, 0.0], [10.0, 0.0]], [[0.0, 50.0], [10.0, 60.0]]])
    labels, which = torch.randint(2, (3000,), generator=generator), torch.randint(2, (3000,), generator=generator)
    features = groups[labels, which] + 0.1 * torch.randn(3000, 2, generator=generator)
    found = filled(features, labels, 2, 500, clusters=2).cluster_centers
    for label in range(2):
        order = found[label][:, 0].argsort()
        torch.testing.assert_close(found[label][order], groups[label].double(), rtol=0, atol=0.2)


def test_clusters_survive_the_file_and_refuse_what_they_cannot(tmp_path):
    features, labels = labelled(40, 4, 2)
    statistics = filled(features, labels, 2, 10, clusters=3)
    statistics.save(tmp_path / "s.safetensors")
    assert torch.equal(ClassStatistics.load(tmp_path / "s.safetensors").cluster_centers, statistics.cluster_centers)
    with pytest.raises(InputError, match="can't be merged"):
        statistics.merge(statistics)
    with pytest.raises(InputError, match="too few images for 30"):
        _ = filled(features, labels, 2, 10, clusters=30).cluster_centers


def test_empty_class_is_named():
    statistics = ClassStatistics(3, 2, class_names=["ant", "bee", "cow"])
    statistics.update(torch.zeros(2, 2), torch.tensor([0, 2]))
    with pytest.raises(InputError, match=r"class 1 \('bee'\) has no images"):
        _ = statistics.centers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_features_change_nothing(bad):
    statistics = ClassStatistics(2, 2)
    with pytest.raises(InputError, match="row 1 of the batch"):
        statistics.update(torch.tensor([[1.0, 2.0], [bad, 0.0]]), torch.tensor([0, 1]))
    assert statistics.counts.sum() == 0


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), r"must be \(items, 2\)"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"0\.\.1"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), "labels must be"),
    ],
)
def test_bad_batches(features, labels, message):
    with pytest.raises(InputError, match=message):
        ClassStatistics(2, 2).update(features, labels)


def test_bad_sizes_and_files(tmp_path):
    for arguments, message in (((1, 4), "num_classes"), ((2, 0), "dim")):
        with pytest.raises(InputError, match=message):
            ClassStatistics(*arguments)
    with pytest.raises(InputError, match="no such file"):
        ClassStatistics.load(tmp_path / "none.safetensors")
    whole = tmp_path / "s.safetensors"
    filled(*labelled(10, 4, 2), 2, 10).save(whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(InputError, match="damaged"):
        ClassStatistics.load(tmp_path / "cut.safetensors")
    sfm_fast.files.save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(InputError, match="no class statistics"):
        ClassStatistics.load(tmp_path / "other.safetensors")


WHOLE = torch.zeros(2, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "centers",
    [WHOLE[0], WHOLE[:, :0], WHOLE[:1], WHOLE[..., :3], WHOLE.float(), WHOLE.long(), WHOLE + float("nan")],
    ids=["flat", "none", "one class", "narrow", "float32", "whole numbers", "NaN"],
)
def test_damaged_cluster_centers_are_named(centers, tmp_path):
    path = tmp_path / "s.safetensors"
    filled(*labelled(10, 4, 2), 2, 10, class_names=["a", "b"]).save(path)
    tensors, metadata = sfm_fast.files.load_tensors(path)
    sfm_fast.files.save_tensors(path, tensors | {"cluster_centers": WHOLE}, metadata)
    assert torch.equal(ClassStatistics.load(path).cluster_centers, WHOLE)
    sfm_fast.files.save_tensors(path, tensors | {"cluster_centers": centers}, metadata)
    with pytest.raises(InputError, match=r"s\.safetensors: damaged statistics \(cluster_centers"):
        ClassStatistics.load(path)
    for names in ("ab", 2, ["a"]):
        sfm_fast.files.save_tensors(path, tensors, metadata | {"class_names": names})
        with pytest.raises(
            InputError, match=r"s\.safetensors: damaged statistics \((2 classes, class names|class_names is)"
        ):
            ClassStatistics.load(path)

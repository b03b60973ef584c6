"""Projectors between backbones: the closed form, how its penalty is chosen, Adam's fit, and inheritance in the evaluator."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tests_data import write_image_folder

from sfm_fast import InputError
from sfm_fast.backbones.load import load_backbone
from sfm_fast.cli import main as cli
from sfm_fast.data.datasets import open_dataset
from sfm_fast.evaluation.classifier import accuracy, train_classifier
from sfm_fast.evaluation.evaluator import Evaluator, ProbeConfig
from sfm_fast.evaluation.heads import Classifier, compose
from sfm_fast.evaluation.projector import fit_projector
from sfm_fast.evaluation.references import labelled_means, nearest_indices, neighbour_indices, random_indices
from sfm_fast.features.compute import view_features
from sfm_fast.views import Augmentation


def test_neighbours_are_distinct_while_there_are_enough():
    features = torch.tensor([[0.0], [1.0], [9.0], [0.1]])
    labels = torch.tensor([0, 0, 0, 1])
    queries, wanted = torch.tensor([[0.4], [0.1], [0.2]]), torch.tensor([0, 0, 1])
    # Query 1 is nearest to image 0 and takes it; query 0 gets the next; image 3 is the only one of class 1.
    assert neighbour_indices(queries, wanted, features, labels).tolist() == [1, 0, 3]
    assert neighbour_indices(torch.tensor([[5.0], [8.0]]), torch.tensor([1, 1]), features, labels).tolist() == [3, 3]
    with pytest.raises(InputError, match="class 2 has no real images"):
        neighbour_indices(queries, torch.tensor([0, 0, 2]), features, labels)


def test_labelled_means():
    features = torch.tensor([[0.0, 1.0], [2.0, 3.0], [5.0, 5.0], [7.0, 5.0]])
    labels = torch.tensor([0, 0, 1, 1])
    means, their_labels = labelled_means(features, labels, ["a", "b"], 1)
    assert means.tolist() == [[1.0, 2.0], [6.0, 5.0]]
    assert their_labels.tolist() == [0, 1]
    centers, their_labels = labelled_means(features, labels, ["a", "b"], 2)
    assert sorted(centers[:2].tolist()) == [[0.0, 1.0], [2.0, 3.0]]
    assert their_labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"class 0 \('a'\) has 2 images, fewer than ipc=3"):
        labelled_means(features, labels, ["a", "b"], 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return str(path)


def tiny(checkpoint):
    return load_backbone("test_resnet", checkpoint, image_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_image_folder(tmp_path_factory.mktemp("data") / "images", per_class=6, size=28, grey=True))


CONFIG = ProbeConfig(seeds=2, epochs=5, views=4)


@pytest.fixture(scope="module")
def evaluator(checkpoint, folder):
    return Evaluator(
        tiny(checkpoint),
        open_dataset(folder, "test", workers=0),
        open_dataset(folder, "train", workers=0),
        distilling=load_backbone(),
        modes=("probe", "inherit"),
        config=CONFIG,
        progress=False,
    )


def test_rows_of_an_inherited_classifier(evaluator):
    phi, psi = evaluator.distilling, evaluator.backbone
    images, labels = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1])
    probe, inherit = evaluator.evaluate("sfm", images, labels)
    assert (probe["mode"], inherit["mode"], inherit["ipc"]) == ("probe", "inherit", 2)
    head = 2 * (psi.num_features + 1)
    kept = 2 * (phi.num_features + 1) + phi.num_features * (psi.num_features + 1)
    assert (probe["parameters"], probe["parameters_folded"], probe["bytes_fp32"]) == (head, head, 4 * head)
    assert (inherit["parameters"], inherit["parameters_folded"]) == (kept, head)
    assert (inherit["bytes_fp32"], inherit["bytes_bf16"]) == (4 * kept, 2 * kept)
    assert inherit["distilled_on"] == phi.name
    assert inherit["backbone"] == psi.name
    assert inherit["solver"] == inherit["projector"] == "ridge"
    assert len(inherit["penalties"]) == inherit["seeds"] == 2
    assert "epochs" not in inherit
    assert 0 < inherit["fit_seconds"] < inherit["seconds"]
    # The same by hand: the same crops on both backbones, and prediction through the folded map.
    scores = []
    for seed in range(2):
        views = (view_features(b, images, 4, Augmentation(noise=False), seed=seed) for b in (psi, phi))
        folded = compose(evaluator.classifier, fit_projector(*views, seed=seed))
        scores.append(accuracy(folded, evaluator.test_features, evaluator.test_labels))
    assert inherit["top1_mean"] == pytest.approx(sum(scores) / 2)


def test_references_inherit_too(evaluator):
    rows = {name: evaluator.reference(name, 2, 28) for name in ("full", "random-real", "nearest-real", "class-means")}
    assert [row["mode"] for row in rows["full"]] == ["probe", "inherit"]
    assert [row["images"] for row in rows["class-means"]] == ["cluster-means"]
    assert [row["distilled_on"] for row in rows["random-real"]] == [None, evaluator.distilling.name]
    assert rows["nearest-real"][0]["distilled_on"] == evaluator.distilling.name
    assert rows["full"][1]["ipc"] == 6
    assert rows["full"][1]["top1_mean"] == 1.0  # two colours, and every image to fit on


def test_the_neighbours_of_real_images_are_themselves(evaluator):
    images, labels = evaluator.sets.nearest_images(2, 28)
    found, their_labels = evaluator.sets.neighbour_images(images, labels, 28)
    assert torch.equal(found, images)
    assert torch.equal(their_labels, labels)


def test_one_backbone_inherits_the_classifier_itself(folder):
    train, test = (open_dataset(folder, split, workers=0) for split in ("train", "test"))
    backbone, classifier = load_backbone(), random_classifier(test.class_names)
    evaluator = Evaluator(backbone, test, modes=("inherit", "kd"), classifier=classifier, config=CONFIG, progress=False)
    images, labels = train.take([0, 6], backbone.transform(1))
    row, distilled = evaluator.evaluate("sfm", images, labels)
    wanted = accuracy(classifier, evaluator.test_features, evaluator.test_labels)
    assert (row["top1_mean"], row["top1_std"], row["fit_seconds"]) == (wanted, 0.0, 0.0)
    assert row["parameters"] == row["parameters_folded"] == 2 * 193
    assert row["solver"] is None
    assert distilled["fit_seconds"] > 0
    assert (distilled["mode"], distilled["temperature"], distilled["alpha"]) == ("kd", 4.0, 0.5)


def random_classifier(class_names):
    """A classifier of the shipped backbone's features that says it is one."""
    features, labels = torch.randn(40, 192, generator=torch.Generator().manual_seed(0)), torch.arange(40)
    classifier = train_classifier(
        features, labels % len(class_names), class_names, weight_decays=[1e-2], validation=0.0
    )
    classifier.metadata["backbone"] = load_backbone().describe()
    return classifier


def test_parts_that_do_not_belong_together_are_refused(checkpoint, folder):
    test = open_dataset("embedded", "test")
    classifier = random_classifier(test.class_names)
    two = open_dataset(folder, "test", workers=0)
    with pytest.raises(InputError, match=r"trained on features of 'fashion_vit' .* backbone is 'test_resnet'"):
        Evaluator(tiny(checkpoint), test, classifier=classifier, modes=("inherit",))
    with pytest.raises(InputError, match="its 10 classes are not the test set's 2"):
        Evaluator(load_backbone(), two, classifier=classifier, modes=("inherit",))
    anonymous = Classifier(torch.zeros(10, 3), torch.zeros(10), test.class_names)
    with pytest.raises(InputError, match="takes 3 features, but the distilling backbone 'fashion_vit' gives 192"):
        Evaluator(load_backbone(), test, classifier=anonymous, modes=("inherit",))
    with pytest.raises(InputError, match="modes inherit, kd need classifier, or train"):
        Evaluator(load_backbone(), test, modes=("probe", "kd", "inherit"))
    with pytest.raises(InputError, match="modes must be among probe, inherit, kd, got 'finetune'"):
        Evaluator(load_backbone(), test, modes=("finetune",))


SMALL = ["--seeds", "2", "--epochs", "3", "--views", "3", "--quiet", "--workers", "0"]


def call(capsys, *argv):
    code = cli.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_on_another_backbone(tmp_path, capsys, checkpoint, folder):
    data, run, result = ["--data", folder, "--workers", "0"], tmp_path / "run", tmp_path / "eval.json"
    assert call(capsys, "distill", *data, "--steps", "2", "--grow-every", "1", "--quiet", "--out", run)[0] == 0
    argv = [
        *(
            "eval",
            run,
            "--data",
            folder,
            *SMALL,
            "--mode",
            "probe,inherit",
            "--mode",
            "kd",
            "--cache",
            tmp_path / "cache",
        ),
        *("--references", "full,random-real,neighbour-real,class-means", "--json", result),
        *("--eval-backbone", "test_resnet", "--eval-checkpoint", checkpoint, "--eval-image-size", "32"),
    ]
    code, out, err = call(capsys, *argv)
    assert code == 0, err
    assert "no --classifier: training one on fashion_vit's features" in out
    found = json.loads(result.read_text())
    assert found["backbone"]["input_size"] == 32
    assert found["classifier"]["backbone"]["name"] == "fashion_vit"
    names = [(row["images"], row["mode"]) for row in found["rows"]]
    images = ["full", "random-real", "neighbour-real", "sfm"]
    wanted = [(name, mode) for name in images for mode in ("probe", "inherit", "kd")]
    assert sorted(names) == sorted([*wanted, ("class-means", "probe")])
    assert "| inherit |" in out.replace("  ", "")
    assert all(row["run"] == str(run) for row in found["rows"] if row["images"] in ("sfm", "neighbour-real"))
    # From the cache, with a saved classifier, and the paper's solver: nothing is trained on the real images.
    saved = tmp_path / "classifier.safetensors"
    assert call(capsys, "classifier", *data, "--quiet", "--weight-decay", "0.01", "--out", saved)[0] == 0
    argv[argv.index("probe,inherit") :] = ["inherit", *argv[argv.index("--cache") :]]
    code, out, err = call(capsys, *argv, "--references", "", "--classifier", saved, "--projector", "adam")
    assert code == 0, err
    assert "training one" not in out
    row = json.loads(result.read_text())["rows"][0]
    assert (row["mode"], row["solver"], row["epochs"]) == ("inherit", "adam", 3)


def test_a_reference_that_wants_too_many_images_is_left_out(tmp_path, capsys, folder):
    result = tmp_path / "eval.json"
    argv = ("eval", "--data", folder, *SMALL, "--ipc", "7", "--json", result)
    code, out, _ = call(capsys, *argv, "--references", "full,nearest-real,random-real,neighbour-real,class-means")
    assert code == 0
    found = json.loads(result.read_text())
    assert [row["images"] for row in found["rows"]] == ["full"]
    left_out = {one["images"]: one["reason"] for one in found["left_out"]}
    assert left_out.keys() == {"nearest-real", "random-real", "neighbour-real", "class-means"}
    assert "has 6 images, fewer than ipc=7" in left_out["nearest-real"]
    assert "nearest-real left out: class 0 ('cat') has 6 images" in out
    code, _, err = call(capsys, *argv, "--references", "nearest-real")
    assert code == 1
    assert "nothing to evaluate" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "probe,finetune"], "--mode: 'finetune' is none of probe, inherit, kd"),
        (["--mode", ","], "--mode must name one or more of"),
        (["--mode", "inherit", "--classifier", "none.safetensors"], "none.safetensors: no such file"),
        (["--mode", "kd", "--temperature", "0"], "temperature must be positive"),
        (["--mode", "kd", "--alpha", "1.5"], "alpha must be in [0, 1]"),
        (["--mode", "inherit", "--references", ""], "nothing to evaluate: give at least one RUN"),
        (["--cache", __file__], "the folder can't be created"),
    ],
)
def test_bad_options_are_one_line(capsys, argv, message):
    code, _, err = call(capsys, "eval", *argv)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_a_classifier_of_another_backbone_is_named(tmp_path, capsys, checkpoint, folder):
    saved = tmp_path / "classifier.safetensors"
    random_classifier(open_dataset("embedded", "test").class_names).save(saved)
    own = ["--backbone", "test_resnet", "--checkpoint", checkpoint, "--image-size", "32"]
    code, _, err = call(capsys, "eval", "--mode", "inherit", "--classifier", saved, *own, *SMALL)
    assert code == 1
    assert f"--classifier {saved}: trained on features of 'fashion_vit'" in err
    code, _, err = call(capsys, "eval", "--mode", "inherit", "--classifier", saved, "--data", folder, *SMALL)
    assert code == 1
    assert "its 10 classes are not the test set's 2" in err


@pytest.mark.parametrize("count", [0, -1])
def test_references_of_no_images_are_refused(count):
    features, labels, names = torch.eye(4), torch.tensor([0, 0, 1, 1]), ["a", "b"]
    for call in (
        lambda: nearest_indices(features, labels, names, count),
        lambda: random_indices(labels, names, count, 0),
        lambda: labelled_means(features, labels, names, count),
    ):
        with pytest.raises(InputError, match=f"ipc must be at least 1, got {count}"):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_neighbours_of_numbers_beyond_float32_are_refused(bad):
    features, labels = torch.eye(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    queries = features.clone()
    queries[1, 2] = bad
    with pytest.raises(InputError, match=r"queries (holds NaN|reaches 1e\+200, beyond the range of float32)"):
        neighbour_indices(queries, labels, features, labels)
    with pytest.raises(InputError, match=r"features (holds NaN|reaches 1e\+200, beyond the range of float32)"):
        neighbour_indices(features, labels, queries, labels)
    largest = torch.finfo(torch.float32).max
    assert neighbour_indices(features * largest, labels, features, labels).sort().values.tolist() == [0, 1, 2, 3]

"""The full-data classifier: the minimum it claims, the penalty it chooses, its command, and its errors."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from sfm_fast import InputError
from sfm_fast.backbones.load import load_backbone
from sfm_fast.cli import main as cli
from sfm_fast.data.datasets import open_dataset
from sfm_fast.evaluation.classifier import accuracy, stratified_split, train_classifier, train_on_source
from sfm_fast.evaluation.heads import Classifier, LinearMap
from sfm_fast.evaluation.softmax import fit_lbfgs, loss_and_gradient
from sfm_fast.features.cache import FeatureCache

NAMES = ["a", "b", "c", "d"]


def blobs(count, noise=1.0, seed=0, dim=12):
    """Four classes whose features are correlated, far from zero and of different scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)) + torch.eye(dim)
    labels = torch.arange(count) % 4
    clean = 2 * torch.eye(4, dim)[labels] + noise * torch.randn(count, dim, generator=generator)
    return clean @ mixing * torch.logspace(-1, 1, dim) + 5, labels


def standardised(features):
    x = features.double()
    return (x - x.mean(0)) / x.std(0, unbiased=False)


def objective(weight, bias, x, labels, decay):
    return cross_entropy(x @ weight.T + bias, labels) + decay / 2 * weight.square().sum()


@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-3])
def test_it_is_the_minimum_that_scikit_learn_finds(decay):
    from sklearn.linear_model import LogisticRegression

    features, labels = blobs(400)
    x = standardised(features)
    reference = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=5000).fit(x.numpy(), labels.numpy())
    ours = train_classifier(features, labels, NAMES, weight_decays=[decay], validation=0)
    expected = torch.from_numpy(x.numpy() @ reference.coef_.T + reference.intercept_).softmax(1)
    torch.testing.assert_close(ours(features).double().softmax(1), expected, rtol=0, atol=2e-3)
    assert ours.metadata["converged"] is True
    assert ours.metadata["iterations"] >= 3


@pytest.mark.parametrize("decay", [1e-1, 1e-3])
def test_the_gradient_at_the_end_is_small(decay):
    features, labels = blobs(400)
    x = standardised(features)
    fit = fit_lbfgs(x.float(), labels, 4, decay)
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    gradients = torch.autograd.grad(objective(weight, bias, x, labels, decay), [weight, bias])
    at_zero = loss_and_gradient(x.float(), labels, torch.zeros_like(weight), torch.zeros_like(bias), decay)[1]
    assert at_zero.abs().max() > 0.1
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-4


def test_closed_form_gradient_is_autograd_s():
    features, labels = blobs(1000)
    x, generator = standardised(features), torch.Generator().manual_seed(3)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    expected = objective(weight, bias, x, labels, 0.03)
    wanted = torch.autograd.grad(expected, [weight, bias])
    with torch.no_grad():
        loss, *found = loss_and_gradient(x.float(), labels, weight, bias, 0.03)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_start_at_the_end_takes_no_time():
    features, labels = blobs(400)
    x = standardised(features).float()
    fit = fit_lbfgs(x, labels, 4, 1e-3)
    again = fit_lbfgs(x, labels, 4, 1e-3, start=fit)
    assert again.converged
    assert again.iterations <= 3 < fit.iterations
    cut = fit_lbfgs(x, labels, 4, 1e-3, max_iterations=2)
    assert (cut.iterations, cut.converged) == (2, False)


@pytest.mark.parametrize("change", ["scale", "shift", "float64", "float16", "constant"])
def test_units_of_the_features_do_not_matter(change):
    features, labels = blobs(400)
    changed = {
        "scale": features * torch.logspace(-4, 4, 12),
        "shift": features + 1000,
        "float64": features.double(),
        "float16": features.half(),
        "constant": torch.cat((features, torch.full((400, 2), 1234.567)), 1),
    }[change]
    plain = train_classifier(features, labels, NAMES, weight_decays=[1e-2], validation=0)
    other = train_classifier(changed, labels, NAMES, weight_decays=[1e-2], validation=0)
    tolerance = 2e-2 if change in ("shift", "float16") else 2e-3  # float32 at 1000 has steps of 6e-5, float16 of 1e-3
    torch.testing.assert_close(other(changed.float()).softmax(1), plain(features).softmax(1), rtol=0, atol=tolerance)
    if change == "constant":
        assert not other.weight[:, 12:].any()


def test_noisy_data_want_a_strong_penalty_and_clean_data_a_weak_one():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    noisy = 0.5 * torch.eye(4, 100)[labels] + torch.randn(400, 100, generator=generator)
    found = train_classifier(noisy, labels, NAMES, validation=0.5).metadata
    assert found["weight_decay"] >= 1e-2
    tried = {row["weight_decay"]: row["top1"] for row in found["search"]}
    assert found["validation_top1"] == tried[found["weight_decay"]] == max(tried.values())
    assert min(tried) > 1e-6  # it stopped before the weakest
    clean, _ = blobs(400, noise=0.3)
    assert train_classifier(clean, labels, NAMES, validation=0.5).metadata["weight_decay"] <= 1e-2


def test_the_last_fit_takes_every_row():
    features, labels = blobs(400)
    chosen = train_classifier(features, labels, NAMES, search_rows=100)
    direct = train_classifier(features, labels, NAMES, weight_decays=[chosen.metadata["weight_decay"]], validation=0)
    torch.testing.assert_close(chosen(features).softmax(1), direct(features).softmax(1), rtol=0, atol=2e-3)
    assert chosen.metadata["train_top1"] == accuracy(chosen, features, labels)
    assert direct.metadata["validation_top1"] is None
    assert direct.metadata["search"] == []


def test_search_rows_bound_the_search(monkeypatch):
    rows = []

    def count(x, *args, **options):
        rows.append(len(x))
        return fit_lbfgs(x, *args, **options)

    monkeypatch.setattr("sfm_fast.evaluation.classifier.fit_lbfgs", count)
    train_classifier(*blobs(400), NAMES, weight_decays=[1e-1, 1e-2], search_rows=100)
    assert rows == [100, 100, 400]


def test_the_split_is_stratified():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3])
    training, held = stratified_split(labels, 0.1, 0)
    assert torch.bincount(labels[held], minlength=4).tolist() == [5, 1, 1, 0]
    assert torch.cat((training, held)).sort().values.tolist() == list(range(64))
    assert not torch.equal(held, stratified_split(labels, 0.1, 1)[1])
    assert torch.bincount(labels[stratified_split(labels, 0.999, 0)[0]]).tolist() == [1, 1, 1, 1]
    assert len(stratified_split(labels, 0, 0)[1]) == 0


def test_it_repeats_itself():
    features, labels = blobs(200)
    options = {"weight_decays": [1e-1, 1e-2]}
    one, two = (train_classifier(features, labels, NAMES, **options) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    other = train_classifier(features, labels, NAMES, seed=1, **options)
    assert not torch.equal(one.weight, other.weight)


def test_accuracy_does_not_depend_on_the_blocks():
    head = LinearMap(torch.eye(4), torch.zeros(4))
    features, labels = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)), torch.arange(1000) % 4
    assert accuracy(head, features, labels) == (features.argmax(1) == labels).double().mean().item()
    assert accuracy(head, features, labels, 4) == 1


BAD = {
    "no decay": (dict(weight_decays=[]), "weight_decays must be one or more positive"),
    "zero decay": (dict(weight_decays=[0.0]), "weight_decays must be one or more positive"),
    "NaN decay": (dict(weight_decays=[float("nan")]), "weight_decays must be one or more positive"),
    "validation": (dict(validation=1.0), "validation must be in"),
    "seed": (dict(seed=-1), "seed must be in"),
    "tolerance": (dict(tolerance=0), "tolerance must be positive"),
    "iterations": (dict(max_iterations=0), "max_iterations must be at least 1"),
    "nothing to choose on": (dict(validation=0), "weight_decays must be a single value if validation is 0, got 6"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    with pytest.raises(InputError, match=BAD[name][1]):
        train_classifier(*blobs(40), NAMES, **BAD[name][0])


def test_bad_rows_are_named():
    features, labels = blobs(40)
    with pytest.raises(InputError, match=r"class 4 \('e'\) has no rows"):
        train_classifier(features, labels, [*NAMES, "e"])
    with pytest.raises(InputError, match=r"labels must be in 0\.\.2"):
        train_classifier(features, labels, NAMES[:3])
    with pytest.raises(InputError, match="at least 2 classes"):
        train_classifier(features, torch.zeros(40).long(), ["a"])
    with pytest.raises(InputError, match="no class has two rows"):
        train_classifier(features[:4], labels[:4], NAMES)
    with pytest.raises(InputError, match="float"):
        train_classifier(features.long(), labels, NAMES)
    for shape in ((40,), (40, 0)):
        with pytest.raises(InputError, match="features must be"):
            train_classifier(torch.zeros(shape), labels, NAMES)
    features[7, 3] = float("nan")
    with pytest.raises(InputError, match="row 7 holds NaN"):
        train_classifier(features, labels, NAMES)
    assert train_classifier(blobs(4)[0], labels[:4], NAMES, weight_decays=[0.1]).metadata["validation_top1"] is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def command(folder, out, *more):
    # The test split for both, to have features in a second or two.
    return ["classifier", "--split", "test", "--quiet", "--cache", str(folder), "--out", str(out), *map(str, more)]


def test_command_on_real_data(folder, tmp_path, capsys):
    out, result = tmp_path / "c.safetensors", tmp_path / "c.json"
    assert cli.main(command(folder, out, "--json", result, "--weight-decay", 0.1, 0.01, 0.001)) == 0
    said, found = capsys.readouterr().out, json.loads(result.read_text())
    classifier = Classifier.load(out)
    assert classifier.class_names == open_dataset("embedded", "test").class_names
    assert classifier.metadata.items() <= found.items()
    assert found["backbone"] == load_backbone().describe()
    assert (found["data"], found["images"], found["solver"]) == ("embedded/test", 2500, "lbfgs")
    assert (found["parameters"], found["bytes"]) == (1930, 7720)
    assert found["converged"]
    assert 0.75 < found["validation_top1"] < 0.95
    assert found["train_top1"] == found["test_top1"] > 0.85
    assert f"weight decay {found['weight_decay']:g}" in said
    assert f"test {100 * found['test_top1']:.1f} %" in said
    assert "7720 bytes" in said
    features, labels = FeatureCache(folder).features(open_dataset("embedded", "test"), load_backbone(), progress=False)
    assert accuracy(classifier, features, labels) == found["test_top1"]
    assert sorted(row["weight_decay"] for row in found["search"]) == [0.001, 0.01, 0.1]
    # The cached features serve another fit; it replaces the file; JSON on stdout pushes the text to stderr.
    more = ("--weight-decay", "0.01", "--test-split", "", "--validation", "0.2", "--json", "-")
    assert cli.main(command(folder, out, *more)) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["test_top1"], found["weight_decay"]) == (None, 0.01)
    assert "weight decay 0.01" in captured.err
    assert Classifier.load(out).metadata["weight_decay"] == 0.01


def test_it_is_good_on_real_features_it_has_not_seen(folder):
    features, labels = FeatureCache(folder).features(open_dataset("embedded", "test"), load_backbone(), progress=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    names = open_dataset("embedded", "test").class_names
    classifier = train_classifier(features[train], labels[train], names, weight_decays=[1e-2], validation=0)
    assert accuracy(classifier, features[test], labels[test]) > 0.8


def test_classes_of_train_and_test_must_agree():
    train, test = open_dataset("embedded", "train"), open_dataset("embedded", "test")
    test.class_names = test.class_names[::-1]
    with pytest.raises(InputError, match="classes are not"):
        train_on_source(train, load_backbone(), test=test)


MISTAKES = {
    "folder of --out": (["--out", "none/c.safetensors"], "no such folder none"),
    "folder of --json": (["--json", "none/c.json"], "no such folder none"),
    "another kind of file": (["--out", "other.txt"], "damaged or not a safetensors file"),
    "cache": (["--cache", "other.txt"], "the folder can't be created"),
    "split": (["--test-split", "other"], "split must be 'train' or 'test'"),
    "decay": (["--weight-decay", "-1"], "weight_decays must be one or more positive"),
    "validation": (["--validation", "1"], "validation must be in"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("mine")

    def work(*_, **__):
        raise AssertionError("worked on bad arguments")

    monkeypatch.setattr("sfm_fast.features.cache.dataset_features", work)
    argv, says = MISTAKES[name]
    assert cli.main(["classifier", "--quiet", *argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sfm-fast classifier: ")
    assert err.count("\n") == 1
    assert says in err
    assert (tmp_path / "other.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["other.txt"]


def test_help_has_defaults_and_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["classifier", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "sfm-fast classifier --data embedded" in out[out.index("example:") :]
    assert "(default: 0.1)" in " ".join(out.split())


@pytest.mark.parametrize("dim", [768, 1536])
def test_many_correlated_features_are_fitted(dim):
    # Two directions in all: the rounding of a float32 matrix of second moments makes it indefinite.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    hidden = torch.randn(60, 2, generator=generator) + 3 * labels.unsqueeze(1)
    features = hidden @ torch.randn(2, dim, generator=generator) + 1
    wide = train_classifier(features, labels, ["a", "b"], weight_decays=[1e-6])
    assert wide.metadata["train_top1"] >= 0.95
    assert wide.weight.isfinite().all()


def test_features_of_a_scale_beyond_float32_are_refused():
    labels = torch.arange(60) % 2
    plain = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) + 3 * labels.unsqueeze(1)
    for features in (plain * 1e-40, plain.double() * 1e-200, plain.double() + 1e12):
        with pytest.raises(InputError, match="too small for a float32 classifier"):
            train_classifier(features, labels, ["a", "b"])
    for scale in (1e200, 1e307):
        with pytest.raises(InputError, match="too much for a float32 classifier"):
            train_classifier(plain.double() * scale, labels, ["a", "b"])
    # Some features of that kind among others are as good as constant.
    mixed = train_classifier(torch.cat((plain, plain * 1e-40), 1), labels, ["a", "b"], weight_decays=[1e-2])
    assert mixed.metadata["train_top1"] == 1
    assert not mixed.weight[:, 8:].any()


def test_a_large_mean_in_float64_is_no_constant():
    labels = torch.arange(200) % 2
    features = 0.2 * (torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + 4 * labels.unsqueeze(1))
    shifted = train_classifier(features.double() + 1e6, labels, ["a", "b"], weight_decays=[1e-2], validation=0)
    plain = train_classifier(features, labels, ["a", "b"], weight_decays=[1e-2], validation=0)
    torch.testing.assert_close(shifted.weight, plain.weight, rtol=1e-3, atol=1e-3)
    assert shifted.metadata["train_top1"] > 0.98

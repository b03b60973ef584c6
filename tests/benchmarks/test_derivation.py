"""docs/derivation.md: the linear gradient is the flow at W = 0; how far it is at W != 0, on batches and when unbalanced; the benchmark."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from tests_data import labelled

import sfm_fast
from sfm_fast.benchmarks.derivation import __main__ as derivation
from sfm_fast.benchmarks.derivation import bound as fb
from sfm_fast.benchmarks.derivation import rows as derivation_rows
from sfm_fast.benchmarks.derivation.figure import findings_table
from sfm_fast.reference.gradient_matching import gradient_distance, linear_gradient

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "cpu" / "derivation.json"


def clustered(classes: int, dim: int, each: int, common: float = 3.0, within: float = 1.0, seed: int = 0):
    """Balanced float64 features around class means around a common mean."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, dim, generator=generator, dtype=torch.float64) + common
    labels = torch.arange(classes).repeat_interleave(each)
    noise = torch.randn(classes * each, dim, generator=generator, dtype=torch.float64)
    return means[labels] + within * noise, labels


def flow_of(z, labels, classes):
    return fb.flow_gradient(fb.class_centers(z, labels, classes))


def weights(count: int, classes: int, dim: int, seed: int = 1):
    return torch.randn(count, classes, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(z, labels, drawn):
    return torch.stack([linear_gradient(z, labels, w, w.new_zeros(len(w))) for w in drawn])


def relative_rms(found, flow):
    return ((found - flow).square().sum(1).mean().sqrt() / flow.norm()).item()


def test_anchored_flows_are_gradients_of_one_class_against_the_real_data():
    """At zero weights, for binary classifiers; their loss is the anchored one, averaged over classes."""
    (syn, syn_labels), (real, _) = clustered(5, 7, 2, seed=1), clustered(5, 7, 6, seed=2)
    targets, anchor = clustered(5, 7, 1, seed=3)[0], real.mean(0)

    def gradient(images):
        weight = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        logits = torch.cat([images, real]) @ weight[:7] + weight[7]
        share = torch.cat([torch.full((len(one),), 0.5 / len(one), dtype=torch.float64) for one in (images, real)])
        truth = torch.cat([torch.ones(len(images)), torch.zeros(len(real))]).double()
        loss = (share * torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")).sum()
        return torch.autograd.grad(loss, weight)[0]

    losses = []
    for c in range(5):
        ours, theirs = gradient(syn[syn_labels == c]), gradient(targets[c : c + 1])
        torch.testing.assert_close(ours[:7], -(syn[syn_labels == c].mean(0) - anchor) / 4)
        assert ours[7].abs() < 1e-15
        losses.append(gradient_distance(ours, theirs))
    expected = sfm_fast.anchored_flow_loss(syn, targets, syn_labels, anchor=anchor)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


@pytest.mark.parametrize(("classes", "dim", "ipc", "each"), [(2, 1, 1, 3), (2, 7, 4, 9), (10, 33, 1, 6), (13, 5, 3, 2)])
def test_at_zero_weights_the_gradient_is_the_flow_and_the_loss_is_sfm(classes, dim, ipc, each):
    (syn, syn_labels), (real, real_labels) = clustered(classes, dim, ipc, seed=1), clustered(classes, dim, each, seed=2)
    weight, bias = torch.zeros(classes, dim, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    centers = torch.stack([real[real_labels == c].mean(0) for c in range(classes)])
    flow = torch.stack([torch.cat([centers[:c], centers[c + 1 :]]).mean(0) - centers[c] for c in range(classes)])
    gradient = linear_gradient(real, real_labels, weight, bias)
    torch.testing.assert_close(gradient[:-classes].view(classes, dim), (classes - 1) / classes**2 * flow)
    torch.testing.assert_close(gradient[-classes:], bias)
    torch.testing.assert_close(gradient, flow_of(real, real_labels, classes))
    one, two = (syn.clone().requires_grad_() for _ in range(2))
    lgm = sfm_fast.linear_gradient_matching_loss(one, syn_labels, real, real_labels, weight, bias)
    sfm = sfm_fast.flow_alignment_loss(two, centers, syn_labels)
    torch.testing.assert_close(lgm, sfm)
    torch.testing.assert_close(torch.autograd.grad(lgm, one), torch.autograd.grad(sfm, two))


def test_draws_that_are_row_shifts_of_one_another_average_to_the_flow():
    """The whole reason why E g(W) = g at any scale: every class is as likely as any other to have any row."""
    z, labels = clustered(6, 9, 5)
    weight = 2 * weights(1, 6, 9)[0]
    found = gradients(z, labels, [weight.roll(k, 0) for k in range(6)])
    flow = flow_of(z, labels, 6)
    assert relative_rms(found, flow) > 0.5
    torch.testing.assert_close(found.mean(0), flow)


def test_unbalanced_classes_add_the_common_mean():
    z, labels = labelled(40, 5, 4)
    z, labels = z[7:] + 10, torch.cat([labels[7:20], labels[20:].clamp_min(1)])
    share = torch.bincount(labels, minlength=4) / len(labels)
    share, mean = share.double(), z.mean(0)
    centers = torch.stack([z[labels == c].mean(0) for c in range(4)])
    found = gradients(z, labels, [torch.zeros(4, 5, dtype=torch.float64)])[0]
    excess = share - 1 / 4
    expected = -share[:, None] * (centers - mean) - excess[:, None] * mean
    torch.testing.assert_close(found, torch.cat([expected.flatten(), -excess]))
    # Weighing every image by 1 / (C * its class's share) makes it the flow again.
    again = (1 / 4 - torch.nn.functional.one_hot(labels, 4)).T.double() @ (z / (4 * share[labels])[:, None]) / len(z)
    torch.testing.assert_close(again.flatten(), fb.flow_gradient(centers)[:-4])


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_softmax_of_random_logits_stays_below_its_bounds(classes):
    noise = torch.randn(4000, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tau in (0.01, 0.3, 1.0, 3.0, 30.0, 1e4):
        p = (tau * noise).softmax(1)
        squares = p.square().sum(1)
        jacobian = squares - 2 * p.pow(3).sum(1) + squares.square()
        u = fb.softmax_variance_bound(torch.tensor(tau), classes).item()
        assert (squares.mean() - 1 / classes).item() <= 1.03 * u
        assert jacobian.mean().sqrt().item() <= 1.02 * fb.jacobian_bound(torch.tensor(tau), classes).item()
        assert u == pytest.approx(tau**2 * (1 / classes + u) * (1 - 1 / classes - u), rel=1e-5, abs=1e-12)
    small, large = (fb.softmax_variance_bound(torch.tensor(tau), classes).item() for tau in (1e-4, 1e4))
    assert small == pytest.approx(1e-8 * (classes - 1) / classes**2, rel=1e-6)
    assert large == pytest.approx(1 - 1 / classes, rel=1e-6)
    assert fb.softmax_variance_bound(torch.tensor(0.0), classes).item() == 0


def test_first_order_in_the_weights_is_exact():
    z, labels = clustered(5, 7, 4)
    zero = torch.zeros(5, 7, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda w: linear_gradient(z, labels, w, zero[:, 0]))(zero)
    expected = (jacobian.norm() / flow_of(z, labels, 5).norm()).item()
    assert fb.weights_first_order(fb.moments(z, labels, 5), 1.0) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("common", [0.0, 3.0])
def test_the_bound_on_drawn_weights_holds_and_is_sharp(common):
    z, labels = clustered(8, 12, 10, common=common)
    found, flow, drawn = fb.moments(z, labels, 8), flow_of(z, labels, 8), weights(300, 8, 12)
    at = {
        sigma: relative_rms(gradients(z, labels, sigma * drawn), flow) for sigma in (1e-4, 1e-3, 0.03, 0.1, 0.3, 1, 10)
    }
    for sigma, measured in at.items():
        bound = fb.weights_bound(z, found, sigma)
        assert measured <= bound * 1.06  # 300 draws' own error
        assert bound <= measured * (1.25 if sigma <= 0.03 else 5)
        if sigma <= 1e-3:
            assert fb.weights_first_order(found, sigma) == pytest.approx(measured, rel=0.06)
    assert math.log10(at[1e-3] / at[1e-4]) == pytest.approx(1, abs=1e-3)


def test_batches_have_exactly_the_distance_they_should():
    z, labels = clustered(3, 4, 3)
    found, flow, zero = fb.moments(z, labels, 3), flow_of(z, labels, 3), [torch.zeros(3, 4, dtype=torch.float64)]
    for n in (3, 6, 9):
        every = [list(rows) for rows in itertools.combinations(range(9), n)]
        of_each = [list(itertools.combinations(range(3 * c, 3 * c + 3), n // 3)) for c in range(3)]
        even = [list(itertools.chain(*rows)) for rows in itertools.product(*of_each)]
        for stratified, batches in ((False, every), (True, even)):
            drawn = torch.cat([gradients(z[rows], labels[rows], zero) for rows in batches])
            torch.testing.assert_close(drawn.mean(0), flow)
            expected = fb.batch_distance(found, n, stratified=stratified)
            assert relative_rms(drawn, flow) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_batches_and_weights_together_stay_below_the_bound():
    z, labels = clustered(3, 4, 3)
    found, flow = fb.moments(z, labels, 3), flow_of(z, labels, 3)
    for sigma in (0.01, 0.1, 1.0):
        drawn = sigma * weights(60, 3, 4)
        every = itertools.combinations(range(9), 3)
        measured = relative_rms(torch.cat([gradients(z[list(r)], labels[list(r)], drawn) for r in every]), flow)
        bound = fb.batch_bound(z, found, 3, sigma)
        assert measured <= bound * 1.06
        assert bound <= measured * 1.6


def test_error_falls_with_the_square_root_of_the_batch():
    part = derivation_rows.Features(*clustered(5, 6, 4000), 5)
    generator = torch.Generator().manual_seed(0)
    for series in (derivation_rows.BATCHES[0], derivation_rows.BATCHES[1]):
        at = [
            relative_rms(torch.stack([part.draw(n, series, generator) for _ in range(300)]), part.flow)
            for n in (20, 320)
        ]
        slope = math.log(at[1] / at[0]) / math.log(320 / 20)
        assert slope == pytest.approx(-0.5, abs=0.04)
        assert at[0] == pytest.approx(part.predicted(20, series), rel=0.08)


def test_cosines_and_losses_follow_from_distances():
    generator = torch.Generator().manual_seed(0)
    real, other = torch.randn(2, 500, 6, generator=generator, dtype=torch.float64)
    for distance in (0.1, 0.5, 0.9, 1.5):
        moved = real + distance * real.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(other)
        cosine = torch.cosine_similarity(real, moved)
        assert cosine.min().item() >= fb.least_cosine(distance) - 1e-12
    assert fb.least_cosine(0.6) == pytest.approx(0.8)
    assert fb.usual_cosine(0.75) == pytest.approx(0.8)
    (syn, syn_labels), (z, labels) = clustered(5, 6, 2, seed=3), clustered(5, 6, 30, seed=4)
    flows = [flow_of(syn, syn_labels, 5), flow_of(z, labels, 5)]
    for weight in 0.02 * weights(50, 5, 6):
        drawn = [gradients(*side, [weight])[0] for side in ((syn, syn_labels), (z, labels))]
        errors = [((g - f).norm() / f.norm()).item() for g, f in zip(drawn, flows, strict=True)]
        assert max(errors) < 1
        most = sum(map(math.asin, errors))
        assert abs(gradient_distance(*drawn) - gradient_distance(*flows)).item() <= most


def test_lgm_sees_the_common_mean_at_second_order_and_flows_not_at_all():
    (syn, syn_labels), (real, labels) = clustered(5, 6, 2, seed=3), clustered(5, 6, 30, seed=4)
    centers, moved = fb.class_centers(real, labels, 5), syn + 2.0
    sfm = [sfm_fast.flow_alignment_loss(z, centers, syn_labels) for z in (syn, moved)]
    torch.testing.assert_close(*sfm)
    direction, bias = weights(1, 5, 6)[0], torch.zeros(5, dtype=torch.float64)

    def seen(sigma: float) -> float:
        """What moving the synthetic features changes of LGM's loss, averaged over W and -W."""
        losses = [
            sfm_fast.linear_gradient_matching_loss(z, syn_labels, real, labels, sign * sigma * direction, bias).item()
            for z in (moved, syn)
            for sign in (1, -1)
        ]
        return sum(losses[:2]) / 2 - sum(losses[2:]) / 2

    assert abs(seen(0.0)) < 1e-12
    assert math.log10(seen(3e-3) / seen(3e-4)) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    ("labels", "features", "message"),
    [
        (torch.tensor([0, 0, 1, 2]), torch.randn(4, 3), "equally large"),
        (torch.tensor([0, 0, 3, 3]), torch.randn(4, 3), "equally large"),
        (torch.tensor([0, 1, 2]), torch.ones(3, 3), "one point"),
    ],
)
def test_moments_want_balanced_classes_that_differ(labels, features, message):
    with pytest.raises(sfm_fast.InputError, match=message):
        fb.moments(features, labels, 3)


ROW = {"series", "n", "predicted", "bound", "cosine_predicted", "cosine_bound", "distance_rms", "distance_of_mean"}
ROW |= {f"{what}_{which}" for what in ("distance", "cosine") for which in ("p10", "median", "p90")}


def check_result(result):
    for found in result["backbones"].values():
        assert {"backbone", "moments", "draws", "seed", "environment", "augmentation", "panels"} == set(found)
        panels = found["panels"]
        assert {name: set(rows[0]) - ROW for name, rows in panels.items()} == {
            "weights": {"sigma"},
            "batch": set(),
            "spread": {"scale"},
        }
        rows = [row for panel in panels.values() for row in panel] + [found["augmentation"]["lgm"]]
        assert all(set(row) >= ROW for row in rows)
        assert all(
            row["predicted"] == pytest.approx(row["bound"]) or row["series"] != "random batch, W = 0" for row in rows
        )
        # A root mean square of few draws scatters: LGM's error lies mostly along one direction, the common mean.
        spread = 1 + 2.5 / math.sqrt(2 * found["draws"])
        assert all(row["distance_rms"] <= spread * row["bound"] + 1e-9 for row in rows)


def test_the_benchmark_on_embedded_data(tmp_path, capsys):
    arguments = ["--data", "embedded", "--images", "120", "--backbones", "fashion_vit", "--out", str(tmp_path)]
    derivation.main([*arguments, "--draws", "6"])
    printed = capsys.readouterr().out
    assert printed.count("\n|") == 8
    path = tmp_path / "derivation.json"
    result = json.loads(path.read_text())
    check_result(result)
    found = result["backbones"]["fashion_vit"]
    assert found["moments"]["images"] == 120
    assert [row["n"] for row in found["panels"]["batch"][:4]] == [10, 30, 100, 120]
    assert found["panels"]["batch"][3]["distance_rms"] < 1e-9  # a balanced batch of all images is the flow
    svg = (tmp_path / "derivation.svg").read_text()
    assert svg.startswith("<?xml")
    assert svg.count("<path") > 50
    path.write_text(json.dumps(result | {"backbones": {"another": found}}))
    derivation.main([*arguments, "--plot-only", "--figure", str(tmp_path / "f.png")])
    assert "another" in capsys.readouterr().out
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot-only"], "no such file"),
        (["--draws", "1"], "--draws"),
        (["--figure", "f.pdf"], "--figure"),
        (["--images", "10"], "at least 2 images"),
    ],
)
def test_the_benchmark_says_what_it_wants(tmp_path, arguments, message):
    with pytest.raises(sfm_fast.InputError, match=message):
        derivation.main(["--data", "embedded", "--backbones", "fashion_vit", "--out", str(tmp_path), *arguments])


def test_the_page_has_the_committed_numbers():
    result = json.loads(COMMITTED.read_text())
    check_result(result)
    page = (ROOT / "docs" / "derivation.md").read_text()
    assert findings_table(result) in page
    for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / figure).is_file()

"""The tables and the figure of targets.json, from numbers made up for the test."""

from __future__ import annotations

from sfm_fast.benchmarks.accuracy.target_tables import shrinkage_table, weight_table, write_figure

VIT, CNN = "fashion_vit", "fashion_cnn"


def rows(name, other, base):
    about = {"backbone": name}
    yield about | {"part": "features", "shrinkage": None, "scale": None, "top1": base}
    for shrinkage in (1.0, 10.0, 4.0):
        for scale in (1.0, 1.2):
            kind = {"part": "features", "shrinkage": shrinkage, "scale": scale, "chosen": shrinkage == 4.0}
            yield about | kind | {"top1": base + shrinkage / 2}
    for shrinkage, weight, chosen in ((1.0, 1.0, False), (10.0, 1.0, False), (4.0, 1.0, True), (4.0, 0.0, True)):
        kind = {"part": "images", "shrinkage": shrinkage, "length_weight": weight, "chosen": chosen, "steps": 5}
        yield about | kind | {"top1": base - 1 + weight, "others": {other: base - 9, "third": base - 11}}


RESULT = {"backbones": [VIT, CNN], "rows": [*rows(VIT, CNN, 70.0), *rows(CNN, VIT, 60.0)]}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_weights_are_in_order_and_only_of_the_chosen_shrinkage():
    header, _, *lines = cells(weight_table(RESULT))
    assert header == ["length weight", "vit: own", "vit: others", "cnn: own", "cnn: others"]
    assert lines == [["0", "69.0", "60.0", "59.0", "50.0"], ["1", "70.0", "60.0", "60.0", "50.0"]]


def test_shrinkages_have_the_targets_and_the_images_and_last_what_the_rule_chose():
    header, _, *lines = cells(shrinkage_table(RESULT))
    assert header == ["shrinkage λ", "vit: targets", "vit: images", "cnn: targets", "cnn: images"]
    assert lines[0] == ["class means", "70.0", "", "60.0", ""]
    assert lines[1] == ["1", "70.5", "70.0", "60.5", "60.0"]
    assert lines[3] == ["auto", "72.0 (λ = 4.0)", "70.0", "62.0 (λ = 4.0)", "60.0"]


def test_one_backbone_has_no_others(tmp_path):
    alone = {
        "backbones": [VIT],
        "rows": [row | ({"others": {}} if "others" in row else {}) for row in rows(VIT, CNN, 70.0)],
    }
    assert cells(weight_table(alone))[2:] == [["0", "69.0", ""], ["1", "70.0", ""]]
    write_figure(alone, tmp_path / "a.svg")


def test_equal_numbers_give_an_equal_figure(tmp_path):
    for name in ("a.svg", "b.svg"):
        write_figure(RESULT, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert not list(tmp_path.glob("*.tmp*"))
    write_figure(RESULT, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"

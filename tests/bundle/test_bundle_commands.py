"""The commands bundle and classify, and the page about them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from sfm_fast import Bundle
from sfm_fast.cli import main as cli
from sfm_fast.cli.runs import common
from sfm_fast.data.datasets import open_dataset
from sfm_fast.evaluation import projector
from sfm_fast.evaluation.heads import Classifier
from sfm_fast.evaluation.projector import fit_on_images
from sfm_fast.synthetic import SyntheticSet

PAGE = Path(__file__).parents[2] / "docs" / "bundle.md"


def files_of(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture
def workplace(tmp_path, monkeypatch, synthetic, classifier, test_data):
    """What the page's commands find in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sfm").mkdir(parents=True)
    synthetic.save(tmp_path / "runs" / "sfm" / "synthetic.safetensors")
    classifier.save(tmp_path / "classifier.safetensors")
    Image.fromarray((test_data[0][0, 0] * 255).byte().numpy()).save(tmp_path / "photo.jpg")
    return tmp_path


def call(capsys, *argv):
    code = cli.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, err


BUNDLE = ["bundle", "runs/sfm", "--classifier", "classifier.safetensors", "--out", "b", "--quiet"]


def test_the_commands(workplace, capsys, tiny_checkpoint):
    other = ["--eval-backbone", "test_vit", "--eval-checkpoint", tiny_checkpoint, "--eval-image-size", 32, "--views", 3]
    code, out, _ = call(capsys, *BUNDLE, *other, "--with-backbone", "--json", "r.json")
    assert code == 0
    assert out.count("runs in fp32, because its weights are stored") == 2
    result = json.loads((workplace / "r.json").read_text())
    assert result["evaluating_backbone"]["name"] == "test_vit"
    assert result["sizes"] == Bundle.load("b").size_report()
    assert f"| {result['sizes'][-2]['bytes']:,} |".replace("| ", "") in out
    assert re.search(r"^\| part +\| +bytes \| +what \|$", out, re.MULTILINE)
    assert "Accuracy of this bundle: not measured." in out
    code, out, _ = call(capsys, "classify", "b", "photo.jpg", "--top", "2", "--json", "-")
    assert code == 0
    row = json.loads(out)["rows"][0]
    assert row["photo"] == "photo.jpg"
    assert [(c["name"], c["probability"]) for c in row["classes"]] == Bundle.load("b").classify("photo.jpg", top=2)
    code, out, _ = call(capsys, "classify", "b", "photo.jpg")
    assert out.count(" %") == 5


@pytest.mark.parametrize("command", ["bundle", "classify"])
def test_help_has_defaults_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"sfm-fast {command}" in out[out.index("example:") :]
    assert "(default: " in out


MISTAKES = {
    "out is a folder": ([*BUNDLE[:-3], "--out", "."], "--out must be a file, got the folder"),
    "out is no bundle": ([*BUNDLE[:-3], "--out", "photo.jpg"], "--out photo.jpg: exists and is no bundle"),
    "out is another file": ([*BUNDLE[:-3], "--out", "classifier.safetensors"], "exists and is no bundle"),
    "views": ([*BUNDLE, "--views", "0"], "--views must be at least 1"),
    "seed": ([*BUNDLE, "--seed", "-1"], "--seed must be at least 0, got -1"),
    "json is out": (
        [*BUNDLE[:-3], "--out", "new", "--json", "new"],
        "--json new: is the same file as --out; choose another one",
    ),
    "no run": (["bundle", "runs/none", *BUNDLE[2:]], "no such file"),
    "no classifier": (["bundle", "runs/sfm", "--classifier", "none", "--out", "b"], "none: no such file"),
    "no photo": (["classify", "whole", "none.jpg"], "none.jpg: no such file"),
    "no bundle": (["classify", "none", "photo.jpg"], "no bundle here"),
    "no bundle but a folder": (["classify", "runs", "photo.jpg"], "runs: no bundle here (it is a folder)"),
    "folder": (["classify", "whole", "runs"], "runs: is a folder; give image files"),
    "min_area": ([*BUNDLE, "--min-area", "0"], "--min-area must be in (0, 1], got 0.0"),
    "test data": ([*BUNDLE, "--test-data", "none"], "'none' is no existing folder or .tar file"),
    "bundle of a bundle": (
        ["bundle", "whole", *BUNDLE[2:]],
        "whole: must be an output folder of `sfm-fast distill`, got a bundle",
    ),
    "eval of a bundle": (["eval", "whole"], "In Python, bundle.synthetic holds its images"),
    "top": (["classify", "whole", "photo.jpg", "--top", "0"], "--top"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(name, workplace, capsys, same):
    argv, message = MISTAKES[name]
    same.save("whole")
    before = files_of(workplace)
    code, _, err = call(capsys, *argv)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert files_of(workplace) == before


def test_the_command_measures_what_it_writes(workplace, capsys, tiny_checkpoint, test_data):
    for label, image in zip(test_data[1][:60].tolist(), test_data[0], strict=False):
        folder = workplace / "data" / "test" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(folder / f"{len(files_of(folder))}.png")
    numbered = Classifier.load("classifier.safetensors")
    names = [str(c) for c in range(10)]
    replace(numbered, class_names=names).save("classifier.safetensors")
    images = SyntheticSet.load("runs/sfm")
    replace(images, class_names=names).save("runs/sfm/synthetic.safetensors")
    other = ["--eval-backbone", "test_vit", "--eval-checkpoint", tiny_checkpoint, "--eval-image-size", 32, "--views", 3]
    test = ["--test-data", "data", "--workers", 0, "--blends", "--min-area", 0.3, "--with-backbone", "--json", "-"]
    code, out, err = call(capsys, *BUNDLE, *other, *test)
    assert code == 0, err
    result = json.loads(out)
    bundle = Bundle.load("b")
    paths = sorted((workplace / "data" / "test").glob("*/*.png"))
    right = [
        answer[0][0] == path.parent.name for answer, path in zip(bundle.classify(paths, top=1), paths, strict=True)
    ]
    (found,) = result["accuracy"].values()
    assert found == {"top1": pytest.approx(sum(right) / 60), "images": 60}
    assert bundle.accuracy == result["accuracy"]
    assert bundle.made["projector"]["min_area"] == 0.3
    assert bundle.made["projector"]["blends"] is True
    assert f"{100 * found['top1']:.1f} % on data/test, 60 images" in bundle.readme()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], None),
        (["--eval-checkpoint", "b"], ("fashion_vit", "b", 224)),
        (["--eval-image-size", "56"], ("fashion_vit", "a", 56)),
        (["--eval-backbone", "x"], ("x", None, None)),
        (["--eval-backbone", "x", "--eval-checkpoint", "b", "--eval-image-size", "56"], ("x", "b", 56)),
    ],
)
def test_the_evaluating_backbone_of_bundle_and_eval(given, wanted, monkeypatch):
    def load(name, checkpoint, *, image_size, **others):
        return SimpleNamespace(asked=(name, checkpoint, image_size), why_precision="", preparation=None)

    monkeypatch.setattr(common, "load_backbone", load)
    own = ["--image-size", "224", "--checkpoint", "a", *given]
    for argv in (["bundle", "run", "--classifier", "c", "--out", "o"], ["eval", "run"]):
        backbone = common.open_evaluating_backbone(cli.parser().parse_args([*argv, *own]))
        assert (None if backbone is None else backbone.asked) == wanted


def test_a_run_of_another_backbone_is_refused(workplace, capsys, tiny_checkpoint):
    argv = [*BUNDLE, "--backbone", "test_vit", "--checkpoint", tiny_checkpoint, "--image-size", 32]
    code, _, err = call(capsys, *argv)
    assert code == 1
    assert "synthetic: made with 'fashion_vit'" in err


def test_the_page_is_true(workplace, capsys, monkeypatch):
    def quick(images, phi, psi, fit, **options):
        return fit_on_images(images, phi, psi, replace(fit, views=3), **options)

    monkeypatch.setattr(projector, "fit_on_images", quick)
    page = PAGE.read_text()
    commands = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].strip().splitlines()
    assert [line.split()[1] for line in commands] == ["classifier", "bundle", "classify"]
    arguments = [shlex.split(line, comments=True)[1:] for line in commands]
    cli.parser().parse_args(arguments[0])  # training is tested elsewhere
    for argv in arguments[1:]:
        assert call(capsys, *argv)[0] == 0
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(snippet, {})
    name, probability = re.search(r"\[\('([^']+)', ([0-9.]+)\)", capsys.readouterr().out).groups()
    assert name in open_dataset("embedded", "test").class_names
    assert 0 < float(probability) <= 1
    helps = ""
    for command in ("bundle", "classify"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        helps += capsys.readouterr().out
    assert [option for option in set(re.findall(r"`(--[a-z-]+)", page)) if option not in helps] == []

"""Whatever is wrong with a file that is read: one line that names it, or a result; never a traceback."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from tests_data import write_image_folder

from benchmarks import rows
from benchmarks.report import page
from sfm_fast import InputError, files
from sfm_fast.backbones.load import load_backbone
from sfm_fast.backbones.shipped import SHIPPED, read_shipped
from sfm_fast.benchmarks import compare
from sfm_fast.bundle import format
from sfm_fast.bundle.bundle import Bundle
from sfm_fast.cli import main as cli
from sfm_fast.data.datasets import open_dataset
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig
from sfm_fast.distill.run_folder import cut_log
from sfm_fast.evaluation.heads import Classifier, Projector
from sfm_fast.evaluation.modes import check_classifier
from sfm_fast.features.cache import FeatureCache
from sfm_fast.gate.baseline import read_baseline
from sfm_fast.schema import check
from sfm_fast.synthetic import SyntheticSet, save_grid, save_image_folder

MUTANTS = 40  # of each kind and format; `make soak` has more
DEEP = "[" * 2000 + "]" * 2000
VALUES = [None, True, 3, -1, 0, 1.5, "", "text", "3", [], {}, [1], ["a"], [None], {"a": 1}, [[{}]], {"name": []},
          2**63, -(2**70), 10**30, 1e308, -1.0, [1e308], "\udce4", "x" * 5000]  # fmt: skip
TEXTS = ["NaN", "Infinity", "-Infinity", "1" * 5000, "1e999", DEEP, "{", "nul", '{"a": NaN}', "", "\x00", '"\ud800"']
DTYPES = [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int32, torch.float16, torch.uint8, torch.int64]


def paths(value, at=()):
    """Every place in a tree of JSON."""
    yield at
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value[:3]):
            yield from paths(item, (*at, key))


def replaced(value, at, new):
    if not at:
        return new
    value = copy.copy(value)
    value[at[0]] = replaced(value[at[0]], at[1:], new)
    return value


def json_mutants(value, rng, count):
    places = list(paths(value))
    for _ in range(count):
        at = rng.choice(places)
        if rng.random() < 0.15 and at and isinstance(at[-1], str):
            table = value
            for key in at[:-1]:
                table = table[key]
            yield json.dumps(replaced(value, at[:-1], {key: item for key, item in table.items() if key != at[-1]}))
        elif rng.random() < 0.25:
            mark = "a mark that stands nowhere else"
            yield json.dumps(replaced(value, at, mark)).replace(json.dumps(mark), rng.choice(TEXTS))
        else:
            yield json.dumps(replaced(value, at, rng.choice(VALUES)))


def metadata_mutants(raw, rng, count):
    tensors, metadata = load_bytes(raw), metadata_of(raw)
    tree = {key: json.loads(text) for key, text in metadata.items() if key != "format"}
    for _ in range(count):
        key = rng.choice(list(tree))
        if rng.random() < 0.1:
            yield save_bytes(tensors, {k: v for k, v in metadata.items() if k != key})
        else:
            text = next(json_mutants(tree[key], rng, 1)).encode(errors="replace").decode()
            yield save_bytes(tensors, metadata | {key: text})


def tensor_mutants(raw, rng, count):
    tensors, metadata = load_bytes(raw), metadata_of(raw)
    for _ in range(count):
        name = rng.choice(list(tensors))
        tensor, kind = tensors[name], rng.randrange(6)
        if kind == 0:
            changed = {name: tensor.to(rng.choice(DTYPES))}
        elif kind == 1:
            changed = {
                name: rng.choice(
                    [tensor.flatten(), tensor[None], tensor.flatten()[:0], tensor[None][:0], torch.tensor(3.0)]
                )
            }
        elif kind == 2 and tensor.is_floating_point():
            changed = {
                name: torch.full_like(tensor.double(), rng.choice([float("nan"), float("inf"), 1e30, -1e30])).to(tensor)
            }
        elif kind == 3:
            changed = {name: tensor.new_full(tensor.shape, rng.choice([-1, 127, 0]))}
        elif kind == 4:
            changed = {name: tensor.double() if tensor.is_floating_point() else tensor.float()}
        else:
            yield save_bytes({k: v for k, v in tensors.items() if k != name}, metadata)
            continue
        yield save_bytes(tensors | {k: v.contiguous() for k, v in changed.items()}, metadata)


def byte_mutants(raw, rng, count):
    start = min(len(raw), 600)
    for _ in range(count):
        kind, changed = rng.randrange(4), bytearray(raw)
        if kind == 0:
            changed = changed[: rng.randrange(len(raw))]
        elif kind == 1:
            changed[:8] = struct.pack("<Q", rng.choice([0, 1, 2**63, len(raw) * 2, 5]))
        else:
            for _ in range(rng.randrange(1, 8)):
                changed[rng.randrange(start)] = rng.randrange(256)
        yield bytes(changed)


def metadata_of(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]).get("__metadata__", {})


def mutants(raw, name, count, seed=0):
    """Damaged copies of a file's bytes."""
    rng = random.Random(f"{name} {seed}")
    yield b""
    yield from byte_mutants(raw, rng, count)
    if raw[:1] == b"{":
        value = json.loads(raw)
        yield from (text.encode(errors="replace") for text in json_mutants(value, rng, 3 * count))
        for encoding in ("utf-16", "utf-8-sig", "latin-1"):
            yield ("é" + raw.decode()).encode(encoding)
    else:
        yield from metadata_mutants(raw, rng, 2 * count)
        yield from tensor_mutants(raw, rng, count)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """One valid small file of every format, made by the commands."""
    place = tmp_path_factory.mktemp("valid")
    data = ["--data", str(write_image_folder(place / "images", per_class=2)), "--quiet"]
    run, classifier = str(place / "run"), str(place / "classifier")
    for argv in (
        ["stats", *data, "--out", str(place / "stats")],
        [
            "distill",
            "--paper",
            *data,
            "--stats",
            str(place / "stats"),
            "--steps",
            "2",
            "--size",
            "8",
            "--out",
            run,
            "--average-last",
            "0.5",
        ],
        [
            "classifier",
            *data,
            "--weight-decay",
            "0.1",
            "--validation",
            "0",
            "--out",
            classifier,
            "--cache",
            str(place / "cache"),
        ],
        [
            "bundle",
            run,
            "--classifier",
            classifier,
            "--out",
            str(place / "bundle.safetensors"),
            "--quiet",
            "--eval-backbone",
            "fashion_cnn",
            "--views",
            "2",
        ],
    ):
        assert cli.main(argv) == 0
    projector = Bundle.load(place / "bundle.safetensors").projector
    assert projector is not None
    projector.save(place / "projector")
    return place


@pytest.fixture(scope="module")
def vit():
    return load_backbone()


def read_statistics(path, place, vit):
    make_distiller(DistillConfig.paper(size=8), vit, None, path, progress=False)


def read_synthetic(path, place, vit):
    synthetic = SyntheticSet.load(path)
    name = synthetic.metadata.get("config", {}).get("method", "")
    made = [one.get("fingerprint", "") for one in synthetic.metadata.get("backbones", [])]
    assert isinstance("".join([name, *made]), str)
    save_image_folder(path.parent / "pictures", synthetic)
    save_grid(path.parent / "grid.png", synthetic.images, synthetic.labels, synthetic.class_names)


def read_classifier(path, place, vit):
    check_classifier(Classifier.load(path), vit, ["cat", "dog"])


def read_projector(path, place, vit):
    Projector.load(path)


def read_checkpoint(path, place, vit):
    config = DistillConfig.paper(size=8, steps=2, average_last=0.5)
    distiller = make_distiller(config, vit, None, place / "stats", progress=False)
    distiller.restore(path)
    for _ in range(distiller.steps_done, 2):
        distiller.average.add(distiller.images.pyramid.data, 1)


def read_bundle(path, place, vit):
    bundle = Bundle.load(path)
    bundle.accuracy_text()
    bundle.size_report()
    repr(bundle)
    bundle.synthetic  # noqa: B018
    bundle.save(path.parent.parent / "another")


def read_cache(path, place, vit):
    FeatureCache(path.parent).features(open_dataset(str(place / "images"), "train"), vit, progress=False)


def read_shipped_file(path, place, vit):
    read_shipped("fashion_vit", path)


def read_gate(path, place, vit):
    read_baseline(path)


def read_bench(path, place, vit):
    found = rows.read_result(path)
    page.write_all(path.parent, "page", found)
    other = path.with_name("other.json")
    other.write_text(json.dumps(BENCH))
    whole = rows.read_result(other)
    for base, head in ((found, whole), (whole, found)):
        changes, _ = compare.compare_files(base, head, compare.Limits())
        compare.table(changes)


def read_log(path, place, vit):
    cut_log(path, 1)


ROW = {"suite": "losses", "case": "c", "contender": "sfm_fast", "mode": "both", "status": "ok", "ours": True, "compiled": False, "median": 0.1, "p20": 0.1,
       "p80": 0.2, "peak_bytes": 10, "flops": 5, "classes": 10, "dim": 3, "ratio": {"median": 1.0, "low": 1.0, "high": 1.0},
       "by_category": {"parameters": 3}, "copy_fraction": 0.1, "rounds": 3, "alignment": "global", "dtype": "fp32",
       "image_size": 8, "predicted_bytes": 3}  # fmt: skip
BENCH = {"format": rows.FORMAT, "preset": "small", "interval": rows.SIGN_TEST, "environment": {"cpu": "c", "threads": 1, "torch": "2", "commit": "a"},
         "rows": [ROW, ROW | {"contender": "torch", "ours": False, "ratio": {"median": 2.0, "low": 1.0, "high": 3.0}}]}  # fmt: skip
GATE = {"format": "sfm_fast gate baseline 1", "values": {"a": {"value": 3, "unit": "bytes", "torch": "2"}}}

FORMATS = {
    "stats": (read_statistics, "stats"),
    "synthetic": (read_synthetic, "run/synthetic.safetensors"),
    "classifier": (read_classifier, "classifier"),
    "projector": (read_projector, "projector"),
    "checkpoint": (read_checkpoint, "run/checkpoint.safetensors"),
    "bundle": (read_bundle, "bundle.safetensors"),
    "bundle with its digest": (read_bundle, "bundle.safetensors"),
    "gate": (read_gate, GATE),
    "bench": (read_bench, BENCH),
    "log": (read_log, {"step": 1, "loss": 0.5}),
}
SOAKED = {"cache": (read_cache, "cache/*train*"), "shipped": (read_shipped_file, SHIPPED["fashion_vit"])}


def digest_anew(path):
    """Make the digest of a bundle that of its tensors, where it can be read at all."""
    try:
        tensors, metadata = files.read_safetensors(path)
    except InputError:
        return
    metadata["sha256"] = json.dumps(format._digest(tensors))
    path.write_bytes(save_bytes(tensors, metadata))


def tracebacks(name, count, tmp_path, place, vit, seed=0):
    """What isn't an ``InputError`` when damaged copies of a format's file are read."""
    read, valid = (FORMATS | SOAKED)[name]
    folder = tmp_path / "copy"
    folder.mkdir()
    if isinstance(valid, dict):
        raw, path = json.dumps(valid).encode(), folder / "file"
    else:
        source = valid if isinstance(valid, Path) else next(place.glob(valid))
        raw, path = source.read_bytes(), folder / source.name
    found = []
    for number, damaged in enumerate([raw, *mutants(raw, name, count, seed)]):
        path.write_bytes(damaged)
        if name == "bundle with its digest" and number:  # a mischievous one: with the digest of what it has become
            digest_anew(path)
        try:
            read(path, place, vit)
        except InputError as error:
            if not number or "\n" in str(error):
                found.append(f"{number}: {error}")
        except Exception as error:
            found.append(f"{number}: {type(error).__name__}: {error}"[:300])
            (tmp_path / f"{number}").write_bytes(damaged)
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_one_line(name, tmp_path, workplace, vit):
    assert tracebacks(name, MUTANTS, tmp_path, workplace, vit) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", [*FORMATS, *SOAKED])
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_files(name, tmp_path, workplace, vit):
    assert tracebacks(name, 10 * MUTANTS, tmp_path, workplace, vit, seed=1) == []


@pytest.mark.parametrize(
    ("value", "spec", "message"),
    [
        ({"a": 1}, {"a": str}, r"\(a is 1\)"),
        ({}, {"a": str}, r"\(it has no a\)"),
        ({"a": [1, "x"]}, {"a": [int]}, r"\(a\[1\] is 'x'\)"),
        ({"a": {"b": True}}, {"a": {str: int}}, r"\(a: b is True\)"),
        (float("inf"), float, r"\(it is inf\)"),
        (10**30, float, r"\(it is 10"),
        ([], {}, r"\(it is \[\]\)"),
        (3, (str, None), r"\(it is 3\)"),
        (3, lambda value: value > 3, r"\(it is 3\)"),
    ],
)
def test_what_a_schema_refuses(value, spec, message):
    with pytest.raises(InputError, match=rf"^f: damaged file {message}"):
        check("f", value, spec)


def test_what_a_schema_takes():
    value = {"a": [1, 2.5], "b": None, "c": {"x": "y"}, "more": object}
    spec = {"a": [float], "b": (str, None), "c": {str: str}, "d?": int}
    assert check("f", value, spec) is value


def test_metadata_of_other_packages_is_no_damage(tmp_path):
    (tmp_path / "w").write_bytes(save_bytes({"x": torch.ones(2)}, {"format": "pt", "title": "no JSON"}))
    assert files.read_safetensors(tmp_path / "w")[1]["title"] == "no JSON"

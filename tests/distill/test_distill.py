"""Distillation: it learns, every method and shape runs, and stopping changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from sfm_fast import InputError
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ImageSource, from_iterable
from sfm_fast.demo.cost import compare_methods, sfm_and_lgm
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig
from sfm_fast.distill.progress import iterate_log
from sfm_fast.distill.run import Interrupted
from sfm_fast.features.compute import class_statistics
from sfm_fast.files import load_tensors, save_tensors
from sfm_fast.measure.starvation import StarvationNotice
from sfm_fast.synthetic import SyntheticSet


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return open_dataset("embedded", "train")


@pytest.fixture(scope="module")
def statistics(backbone, source):
    return class_statistics(source, backbone, progress=False)


def run(folder, backbone, source, statistics, resume=False, distil=None, **options):
    config = DistillConfig.paper(**({"steps": 12, "grow_every": 5, "lr": 0.02} | options))
    distiller = distil or make_distiller(config, backbone, source, statistics)
    return distiller.run(folder, resume=resume, progress=False, checkpoint_every=4, log_every=1, grid_every=6)


def test_loss_falls(tmp_path, backbone, source, statistics):
    run(tmp_path, backbone, source, statistics, steps=60, grow_every=10)
    losses = [row["loss"] for row in iterate_log(tmp_path / "log.jsonl")]
    assert sum(losses[-10:]) / 10 < sum(losses[:5]) / 5 - 0.3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ipc": 3},
        {"views": 2},
        {"parametrization": "pixel"},
        {"alignment": "class"},
        {"alignment": "pair"},
        {"metric": "mse"},
        {"size": 20},
        {"method": "sfm-decoupled", "alpha": 0.5},
        {"method": "lgm", "views": 2},
        {"method": "lgm", "views": 2, "lgm_variant": "frozen", "ipc": 2},
        {"method": "lgm", "views": 2, "lgm_variant": "stock"},
        {"noise": False, "min_area": 0.5},
    ],
    ids=str,
)
def test_every_kind_of_run_resumes_bit_for_bit(tmp_path, backbone, source, statistics, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, backbone, source, statistics, **options)
    run(parts, backbone, source, statistics, **({"steps": 5} | options))
    run(parts, backbone, source, statistics, resume=True, **options)
    one, two = (SyntheticSet.load(folder) for folder in (whole, parts))
    assert torch.equal(one.images, two.images)
    assert one.images.isfinite().all()
    states = [load_tensors(folder / "checkpoint.safetensors")[0] for folder in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    logs = [[row["loss"] for row in iterate_log(folder / "log.jsonl")] for folder in (whole, parts)]
    assert logs[0] == logs[1]
    assert one.labels.tolist() == sorted(list(range(10)) * options.get("ipc", 1))
    assert (
        not any(parameter.requires_grad for parameter in backbone.model.parameters())
        or options.get("lgm_variant") == "stock"
    )
    backbone.model.requires_grad_(False)


def test_lgm_variants_follow_the_same_path(tmp_path, backbone, source, statistics):
    results = []
    for variant in ("closed-form", "frozen", "stock"):
        run(tmp_path / variant, backbone, source, statistics, method="lgm", views=2, lgm_variant=variant, steps=4)
        results.append(SyntheticSet.load(tmp_path / variant).images)
    backbone.model.requires_grad_(False)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_resuming_changes_nothing(tmp_path, backbone, source, statistics, signum):
    run(tmp_path / "whole", backbone, source, statistics)
    distiller = make_distiller(DistillConfig.paper(steps=12, grow_every=5, lr=0.02), backbone, source, statistics)
    with pytest.raises(Interrupted) as stopped:
        distiller.run(
            tmp_path / "parts",
            progress=False,
            log_every=1,
            on_step=lambda step: os.kill(os.getpid(), signum) if step == 7 else None,
        )
    assert stopped.value.signum == signum
    assert stopped.value.step == 7
    run(tmp_path / "parts", backbone, source, statistics, resume=True)
    one, two = (SyntheticSet.load(tmp_path / name) for name in ("whole", "parts"))
    assert torch.equal(one.images, two.images)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_stopped_process_resumes_from_its_last_checkpoint(tmp_path, statistics, signum, code):
    statistics.save(tmp_path / "stats.safetensors", statistics.provenance)
    command = [
        sys.executable,
        "-m",
        "sfm_fast",
        "distill",
        "--paper",
        "--steps",
        "400",
        "--grow-every",
        "3",
        "--checkpoint-every",
        "10",
        "--log-every",
        "1",
        "--threads",
        "1",
        "--quiet",
        "--stats",
        str(tmp_path / "stats.safetensors"),
        "--out",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    assert process.wait() == code
    done = load_tensors(tmp_path / "killed" / "checkpoint.safetensors")[1]["step"]
    steps = str(done + 7)
    finish = [steps if word == "400" else word for word in command]
    subprocess.run([*finish, "--resume"], check=True)
    subprocess.run(
        [str(tmp_path / "whole") if word == str(tmp_path / "killed") else word for word in finish], check=True
    )
    one, two = (SyntheticSet.load(tmp_path / name) for name in ("whole", "killed"))
    assert torch.equal(one.images, two.images)
    assert [row["step"] for row in iterate_log(tmp_path / "killed" / "log.jsonl")] == list(range(1, int(steps) + 1))


def test_what_a_run_leaves(tmp_path, backbone, source, statistics):
    from PIL import Image

    summary = run(tmp_path, backbone, source, statistics, ipc=2)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    folders = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert folders[0] == "0_T-shirt_top"
    assert len(folders) == 10
    synthetic = SyntheticSet.load(tmp_path)
    assert synthetic.class_names == source.class_names
    assert synthetic.metadata["config"]["ipc"] == 2
    for label, folder in enumerate(folders):
        files = sorted((tmp_path / "images" / folder).iterdir())
        stored = [torch.from_numpy(np.array(Image.open(file))) / 255 for file in files]
        expected = synthetic.images[synthetic.labels == label][:, 0]
        assert (torch.stack(stored) - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert {"grid.png", "checkpoint.safetensors", "synthetic.safetensors", "log.jsonl"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["000006.png", "000012.png"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_starved_run_says_so_unless_it_waits_for_images(tmp_path, backbone, source, statistics, monkeypatch):
    monkeypatch.setattr(StarvationNotice, "add", lambda self, step: "others use the CPUs")
    with pytest.warns(RuntimeWarning, match="others use the CPUs"):
        make_distiller(DistillConfig.paper(steps=2), backbone, source, statistics).run(tmp_path / "sfm", progress=False)
    lgm = make_distiller(DistillConfig.paper(method="lgm", steps=2, views=1), backbone, source, statistics)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        lgm.run(tmp_path / "lgm", progress=False)


def test_an_existing_run_is_not_overwritten(tmp_path, backbone, source, statistics):
    run(tmp_path, backbone, source, statistics)
    before = (tmp_path / "synthetic.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        run(tmp_path, backbone, source, statistics, seed=1)
    with pytest.raises(InputError, match="seed was 0, now 1"):
        run(tmp_path, backbone, source, statistics, resume=True, seed=1)
    with pytest.raises(InputError, match="more than steps=3"):
        run(tmp_path, backbone, source, statistics, resume=True, steps=3)
    assert (tmp_path / "synthetic.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="nothing to resume"):
        run(tmp_path / "empty", backbone, source, statistics, resume=True)


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, backbone, source, statistics):
    run(tmp_path, backbone, source, statistics)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: damaged"):
        run(tmp_path, backbone, source, statistics, resume=True)


def test_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path, backbone, source, statistics):
    config = DistillConfig.paper(steps=12, grow_every=5)
    distiller = make_distiller(config, backbone, source, statistics)
    normal = distiller.objective.loss

    def poisoned(features, labels, step):
        return normal(features, labels, step) * (float("nan") if step == 6 else 1.0)

    distiller.objective.loss = poisoned
    with pytest.raises(InputError, match="loss became nan or infinite at step 6"):
        distiller.run(tmp_path, progress=False)
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == 6
    assert all(tensor.isfinite().all() for tensor in load_tensors(tmp_path / "checkpoint.safetensors")[0].values())


def test_lgm_needs_random_access(backbone, statistics):
    class Stream:
        def __iter__(self):
            return iter([(torch.rand(1, 28, 28), 0), (torch.rand(1, 28, 28), 1)])

    with pytest.raises(InputError, match="can only be read in order"):
        make_distiller(DistillConfig.paper(method="lgm"), backbone, from_iterable(Stream(), ["a", "b"], channels=1))
    with pytest.raises(InputError, match="needs the data set"):
        make_distiller(DistillConfig.paper(method="lgm"), backbone)
    with pytest.raises(InputError, match="needs class statistics"):
        make_distiller(DistillConfig.paper(), backbone)


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "x"},
        {"ipc": 0},
        {"steps": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"alpha": 2.0},
        {"views": 0},
        {"min_area": 0.0},
        {"size": 0},
    ],
)
def test_bad_options_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        DistillConfig.paper(**bad)


def test_compare_measures_lgm_above_sfm(backbone, source, statistics):
    rows = compare_methods(sfm_and_lgm(DistillConfig.paper()), backbone, source, statistics, rounds=1)
    assert [row["name"] for row in rows] == ["SFM", "LGM closed-form", "LGM frozen", "LGM stock"]
    assert [row["views"] for row in rows] == [1, 10, 10, 10]
    peaks = [row["peak_bytes"] for row in rows]
    assert peaks[0] * 5 < peaks[1]  # ten views and a hundred real images against ten views in all
    assert peaks[2] <= peaks[3]
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_a_folder_of_other_files_is_left_alone(tmp_path, backbone, source, statistics):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_text("holiday")
    (tmp_path / "log.jsonl").write_text("mine")
    for overwrite in (False, True):
        distiller = make_distiller(DistillConfig.paper(steps=3), backbone, source, statistics)
        with pytest.raises(InputError, match="holds files that are not of a run"):
            distiller.run(tmp_path, overwrite=overwrite, progress=False)
    assert (tmp_path / "images" / "mine.jpg").read_text() == "holiday"
    assert (tmp_path / "log.jsonl").read_text() == "mine"


def test_overwrite_keeps_the_old_run_until_the_new_one_makes_a_step(tmp_path, backbone, source, statistics):
    run(tmp_path, backbone, source, statistics)
    before = (tmp_path / "synthetic.safetensors").read_bytes()
    distiller = make_distiller(DistillConfig.paper(steps=3), backbone, source, statistics)
    distiller.objective.loss = lambda features, labels, step: features.sum() * float("nan")
    with pytest.raises(InputError, match="at step 0"):
        distiller.run(tmp_path, overwrite=True, progress=False)
    assert (tmp_path / "synthetic.safetensors").read_bytes() == before
    make_distiller(DistillConfig.paper(steps=3), backbone, source, statistics).run(
        tmp_path, overwrite=True, progress=False
    )
    assert (tmp_path / "synthetic.safetensors").read_bytes() != before
    assert not list((tmp_path / "grids").iterdir())


@pytest.mark.parametrize("damage", ["levels", "moments", "step", "config", "provenance", "micro_batch", "adam_steps"])
def test_a_checkpoint_with_wrong_contents_is_one_clear_line(tmp_path, backbone, source, statistics, damage):
    run(tmp_path, backbone, source, statistics)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = load_tensors(path)
    if damage == "levels":
        metadata["live_levels"] += 1
    elif damage == "moments":
        del tensors["exp_avg"]
    elif damage == "adam_steps":
        tensors["adam_steps"] += 100
    elif damage == "step":
        metadata["step"] = -3
    else:
        del metadata[damage]
    save_tensors(path, tensors, metadata)
    with pytest.raises(InputError, match="damaged checkpoint"):
        run(tmp_path, backbone, source, statistics, resume=True)

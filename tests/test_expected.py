"""Kept expected values are believed as long as definition and inputs are what they were, and not a moment longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import CodeType

import definitions
import expected
import expected_cache
import pytest
import torch

from tests.cases import losses as cases

CASE = ("odd", torch.float32, "global", "cosine")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Filled with one case; ``definitions.expected`` remembers nothing."""
    assert expected.fill(tmp_path, ["odd"]) == 24
    monkeypatch.setenv(expected_cache.VARIABLE, str(tmp_path))
    definitions.expected.cache_clear()
    yield tmp_path
    definitions.expected.cache_clear()


@pytest.fixture
def computed(monkeypatch):
    """The list of what is computed."""
    found, original = [], definitions.computed
    monkeypatch.setattr(definitions, "computed", lambda *args: found.append(args[1:]) or original(*args))
    return found


def test_kept_values_are_the_computed_ones(folder, computed):
    kept = definitions.expected(*CASE)
    assert computed == []
    fresh = definitions.computed(definitions.inputs_of("odd", torch.float32), "global", "cosine")
    assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(kept, fresh, strict=True))
    assert expected.fill(folder, ["odd"]) == 0  # all there


def test_they_are_read_and_not_only_there(folder, computed):
    (path,) = folder.glob("odd-float32-global-cosine-*.pt")
    torch.save([torch.tensor(7.0), torch.ones(2)], path)
    assert definitions.expected(*CASE)[0] == 7


def test_another_definition_is_computed(folder, computed, monkeypatch):
    def cosine(f, g, eps):
        return f.sum() * g.sum()

    monkeypatch.setattr(definitions, "DEFINITION", (*definitions.DEFINITION[:3], cosine, *definitions.DEFINITION[4:]))
    definitions.expected(*CASE)
    assert computed == [("global", "cosine")]


@pytest.mark.parametrize("part", [0, 1])
def test_other_inputs_are_computed(folder, computed, monkeypatch, part):
    inputs = [tensor if tensor is None else tensor.clone() for tensor in definitions.inputs_of("odd", torch.float32)]
    inputs[part][0, 0] = inputs[part][0, 0].nextafter(torch.tensor(9.0))
    changed = cases.LossCase("odd", lambda dtype: tuple(inputs))
    monkeypatch.setattr(definitions, "LOSS_CASES", (changed,))
    definitions.expected(*CASE)
    assert computed == [("global", "cosine")]


def test_every_case_has_its_own_name():
    names = {
        definitions.kept_name(case.name, dtype, "pair", metric, definitions.inputs_of(case.name, dtype))
        for case in cases.LOSS_CASES
        for dtype in expected.DTYPES
        for metric in ("cosine", "mse")
    }
    assert len(names) == len(cases.LOSS_CASES) * 3 * 2


def test_a_damaged_file_is_computed_anew(folder, computed):
    (path,) = folder.glob("odd-float32-global-cosine-*.pt")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="can't be read"):
        definitions.expected(*CASE)
    assert computed == [("global", "cosine")]


def test_all_functions_of_the_definition_are_part_of_the_name():
    """What flow_alignment calls in this module, it names itself: a helper that is added later must be listed too."""
    listed = {function.__name__ for function in definitions.DEFINITION}

    def names(code):
        return {
            *code.co_names,
            *(name for part in code.co_consts if isinstance(part, CodeType) for name in names(part)),
        }

    called = {name for function in definitions.DEFINITION for name in names(function.__code__)}
    here = {name for name in called if getattr(getattr(definitions, name, None), "__module__", "") == "definitions"}
    assert {"flows", "pair_flows", "cosine", "flow_alignment"} <= here <= listed


def test_without_a_folder_nothing_is_read_or_written(monkeypatch, computed, tmp_path):
    monkeypatch.delenv(expected_cache.VARIABLE, raising=False)
    definitions.expected.cache_clear()
    definitions.expected(*CASE)
    assert computed == [("global", "cosine")]


def test_the_command(tmp_path, monkeypatch):
    script = Path(expected.__file__)
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import expected; expected.LOSS_CASES = expected.LOSS_CASES[:1]; expected.main()"
    for made in (24, 0):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(tmp_path / "kept")], capture_output=True, text=True
        )
        assert done.stdout == f"{made} new files in {tmp_path / 'kept'}\n", done.stderr
    assert len(list((tmp_path / "kept").glob("*.pt"))) == 24

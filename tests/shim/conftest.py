"""The emulator's library, built once, and both orders of its threads and blocks."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator

import pytest
from shim_calls import build


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build(tmp_path_factory.mktemp("shim") / "shim.so")


@pytest.fixture(params=["ascending", "descending"])
def both_orders(request: pytest.FixtureRequest, shim: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The order in which threads and blocks run: a missing barrier shows in one of the two."""
    shim.set_reversed(int(request.param == "descending"))
    yield shim
    shim.set_reversed(0)

"""Options: what a field may be is checked, told in one line, and offered on the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from sfm_fast import InputError
from sfm_fast.arguments import add_options, given_options, made
from sfm_fast.options import check_options, option


@dataclass(frozen=True, kw_only=True)
class Some:
    kind: str = option("a", "which", choices=("a", "b"))
    count: int = option(2, "how many", least=1, most=9)
    side: int | None = option(None, "in pixels", usual="the data's", least=1)
    share: float = option(0.5, "of all", within="(0, 1]")
    rate: float = option(0.1, "a step", most=10)
    plain: float = option(1.0, "anything")
    loud: bool = option(False, "whether to tell")

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "c"}, "kind must be one of ('a', 'b'), got 'c'"),
        ({"kind": None}, "kind must be one of ('a', 'b'), got None"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 10}, "count must be at most 9, got 10"),
        ({"count": "3"}, "count must be a whole number, got '3'"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"count": 2.0}, "count must be a whole number, got 2.0"),
        ({"side": 0}, "side must be at least 1, got 0"),
        ({"share": 0}, "share must be in (0, 1], got 0"),
        ({"share": float("nan")}, "share must be in (0, 1], got nan"),
        ({"share": True}, "share must be in (0, 1], got True"),
        ({"rate": 0.0}, "rate must be positive and at most 10, got 0.0"),
        ({"rate": "x"}, "rate must be positive and at most 10, got 'x'"),
        ({"plain": "x"}, "plain must be a number, got 'x'"),
        ({"loud": "no"}, "loud must be True or False, got 'no'"),
    ],
)
def test_what_is_not_allowed_is_named(given, message):
    with pytest.raises(InputError) as raised:
        Some(**given)
    assert str(raised.value) == message


def test_numbers_of_other_packages_become_plain_ones():
    some = Some(count=np.int64(3), share=np.float32(0.5), rate=Fraction(1, 2), side=np.uint8(7))
    assert (some.count, some.share, some.rate, some.side) == (3, 0.5, 0.5, 7)
    assert [type(value) for value in (some.count, some.share, some.rate, some.side)] == [int, float, float, int]
    assert Some(share=1).share == 1  # a whole number is a number


def test_the_command_line_has_them(capsys):
    parser = argparse.ArgumentParser()
    add_options(parser, Some, kind="--sort")
    args = parser.parse_args([])
    assert given_options(args, Some) == {}
    args = parser.parse_args(["--sort", "b", "--count", "3", "--loud"])
    assert made(args, Some) == Some(kind="b", count=3, loud=True)
    with pytest.raises(InputError, match=r"^--count must be at most 9, got 12$"):
        made(parser.parse_args(["--count", "12"]), Some)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for line in (
        "which (default: a)",
        "in pixels (default: the data's)",
        "of all (default: 0.5)",
        "to tell (default: no)",
    ):
        assert line in shown

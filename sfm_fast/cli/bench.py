"""`sfm-fast bench`: the command of `sfm_fast.benchmarks`."""

import argparse

from ..benchmarks.command import EXAMPLE as EXAMPLE
from ..benchmarks.command import SUMMARY as SUMMARY
from ..benchmarks.command import add_arguments as add_arguments

NAME = "bench"


def check(args: argparse.Namespace) -> None:
    """Nothing can be wrong before the work."""

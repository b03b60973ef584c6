"""`sfm-fast bench`: the command of `sfm_fast.benchmarks`."""

from ..benchmarks.command import EXAMPLE as EXAMPLE
from ..benchmarks.command import SUMMARY as SUMMARY
from ..benchmarks.command import add_arguments as add_arguments
from ..benchmarks.command import run as run

NAME = "bench"

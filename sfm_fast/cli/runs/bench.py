"""Runs `sfm-fast bench`."""

from ...benchmarks.command import run as run

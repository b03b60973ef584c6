"""`sfm-fast info`: versions, devices, backends and the shipped backbones."""

from __future__ import annotations

import argparse

NAME = "info"
SUMMARY = "Print versions, devices, backends and facts about the shipped backbones, for bug reports."
EXAMPLE = "sfm-fast info --json info.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def check(args: argparse.Namespace) -> None:
    """Nothing can be wrong before the work."""

"""`sfm-fast`: parse the command line, run the command, and report a user's mistake in one line.

The modules of the commands declare their options and check what can be checked without torch; what they do is in `runs`, which is
imported when a command is run. So help and usage errors take no time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from ..distill.run_folder import Interrupted
from ..errors import InputError, reason_of
from ..files import check_output_file, check_replaces_json, expand
from ..version import __version__
from . import bench, bundle, classifier, classify, demo, distill, evaluate, info, plan, stats
from .streams import exit_code, steady_streams

# What the package and its extra `distill` install, by the names under which it is imported; another missing module is our own fault.
INSTALLED = ("torch", "numpy", "timm", "safetensors", "tqdm", "PIL", "matplotlib", "sklearn", "torchvision")
COMMANDS = (demo, stats, distill, classifier, evaluate, bundle, classify, plan, bench, info)


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; with ``only``, a word of the command line, the others have their names and summaries alone."""
    top = argparse.ArgumentParser(
        prog="sfm-fast", description="Distil image data sets for frozen vision models by statistical flow matching."
    )
    top.add_argument("--version", action="version", version=f"sfm-fast {__version__}")
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=_Formatter,
        )
        if only not in (None, command.NAME):
            continue
        command.add_arguments(sub)
        sub.add_argument(
            "--json",
            metavar="FILE",
            help="write the whole result as JSON to this file ('-': to stdout; other output then goes to stderr)",
        )
        sub.set_defaults(run=functools.partial(_check_and_run, command))
    return top


def _check_and_run(command: Any, args: argparse.Namespace) -> None:
    """Check what needs no torch, and only then import what the command does."""
    command.check(args)
    name = command.__name__.rpartition(".")[2]
    importlib.import_module(f"{__package__}.runs.{name}").run(args)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option, and leaves the line breaks of the example."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or isinstance(action.default, bool)
        return action.help if plain else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for bad input or a failed write, 2 for a bad command line, 128 + n for signal n.

    If stdout can't be written, the command still does its work and writes its files; only the exit code reports the failure.
    """
    with steady_streams() as out:
        try:
            words = sys.argv[1:] if argv is None else argv
            code = _run(parser(next((word for word in words if not word.startswith("-")), "")).parse_args(words))
        except SystemExit as stop:
            raise SystemExit(exit_code(stop.code, out) if isinstance(stop.code, int) else stop.code) from None
        return exit_code(code, out)


def _run(args: argparse.Namespace) -> int:
    try:
        for name, value in vars(args).items():
            if isinstance(value, str) and value.startswith("~/"):  # the shell doesn't expand ~ after '='
                setattr(args, name, str(expand(value, f"--{name.replace('_', '-')}")))
        if args.json and args.json != "-":
            check_output_file(args.json, "--json")
            check_replaces_json(args.json, "--json")
        args.run(args)
    except (InputError, OSError) as error:
        print(f"sfm-fast {args.command}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in INSTALLED:
            raise
        print(
            f"sfm-fast {args.command}: needs the package {error.name!r}: pip install 'sfm_fast[distill]'",
            file=sys.stderr,
        )
        return 1
    except MemoryError as error:
        return _out_of_memory(args.command, error)
    except RuntimeError as error:
        if sys.modules.get("torch") is None:  # torch's errors alone say in a text that memory ran out
            raise
        from ..measure.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _out_of_memory(args.command, error)
    except Interrupted as stop:
        print(f"sfm-fast {args.command}: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(f"sfm-fast {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _out_of_memory(command: str, error: Exception) -> int:
    print(
        f"sfm-fast {command}: out of memory ({reason_of(error)}); use fewer or smaller images or a smaller batch",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""`sfm-fast bench compare`: what got worse between two commits, or between two result files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import check_output_file, write_text
from . import common

NAME = "compare"
SUMMARY = "Compare two commits, or two result files, and fail where something got worse."
EXAMPLE = "sfm-fast bench compare --base main --only bytes,instructions"
COULD_NOT_COMPARE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="result files of `sfm-fast bench`: base, then head")
    parser.add_argument(
        "--base", metavar="REF", help="commit to compare with: built and measured here, beside the head"
    )
    parser.add_argument(
        "--head", metavar="REF", help="commit to judge (default: the working tree, uncommitted changes included)"
    )
    common.add_list_argument(
        parser,
        "--only",
        metavar="KIND",
        default="bytes,flops,instructions,kernels,times",
        help="what to compare",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="F",
        default=0.01,
        help="fraction that bytes, operations and instructions may grow",
    )
    parser.add_argument(
        "--time-tolerance",
        type=float,
        metavar="F",
        default=0.1,
        help="fraction that times, or ratios of times, may get worse",
    )
    parser.add_argument("--allow-missing", action="store_true", help="what only the base has is no regression")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="compile the GPU kernels of both commits instead of comparing their committed tables (minutes)",
    )
    parser.add_argument("--device", default="auto", help="where to measure memory and times: auto, cpu, cuda, …")
    parser.add_argument("--threads", type=int, metavar="N", default=1, help="CPU threads when measuring times")
    parser.add_argument("--markdown", metavar="FILE", help="write the table here too, such as for $GITHUB_STEP_SUMMARY")


def run(args: argparse.Namespace) -> None:
    """Leaves with exit code 1 where something got worse, 2 where nothing could be compared."""
    try:
        regressions = _compare(args)
    except (InputError, OSError) as error:
        print(f"sfm-fast bench compare: {error}", file=sys.stderr)
        raise SystemExit(COULD_NOT_COMPARE) from error
    if regressions:
        raise SystemExit(1)


def _compare(args: argparse.Namespace) -> int:
    from sfm_fast.benchmarks.report.rows import read_result

    from ..benchmarks import compare

    limits = compare.Limits(args.tolerance, args.time_tolerance, args.allow_missing)
    kinds = common.check_names("--only", args.only, compare.KINDS, "sfm-fast bench compare FILE FILE")
    if not kinds:
        raise InputError(f"--only: an empty list; wanted some of {', '.join(compare.KINDS)}")
    if args.threads < 1:
        raise InputError(f"--threads must be at least 1, got {args.threads}")
    if args.markdown:
        check_output_file(args.markdown, "--markdown")
    if args.files:
        if args.base or args.head:
            raise InputError("give either two result files or --base, not both")
        if len(args.files) != 2:
            raise InputError(f"wanted two result files, base and head, got {len(args.files)}")
        base, head = (read_result(path) for path in args.files)
        changes, notes = compare.compare_files(base, head, limits, kinds)
        facts: dict[str, Any] = {"base": args.files[0], "head": args.files[1]}
    elif args.base:
        changes, notes, facts = _commits(args, limits, kinds)
    else:
        raise InputError("give two result files, or --base REF in a git checkout")
    if all(change.verdict == compare.NOT_COMPARED for change in changes):
        raise InputError("; ".join(["nothing could be compared", *notes]))
    text = compare.table(changes)
    lines = [*notes, *([text, ""] if text else []), compare.summary(changes)]
    if args.markdown:
        title = f"### {facts['base']} → {facts['head']}"
        write_text(
            args.markdown, "\n\n".join([title, compare.summary(changes), *notes, *([text] if text else [])]) + "\n"
        )
    common.finish(args, compare.result_of(changes, notes=notes, **facts), *lines)
    regressions: int = compare.count(changes, compare.REGRESSION)
    return regressions


def _commits(args: argparse.Namespace, limits: Any, kinds: list[str]) -> tuple[list[Any], list[str], dict[str, Any]]:
    from ..backbones.load import resolve_device
    from ..benchmarks import compare_build, worker
    from ..benchmarks.compare_times import compare_times
    from ..benchmarks.quantities import compare_quantities

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    device = str(resolve_device(args.device))
    root = compare_build.find_checkout(Path.cwd())
    revisions = [
        compare_build.resolve(root, args.base, "--base"),
        compare_build.resolve(root, args.head, "--head"),
    ]
    if revisions[0].tree == revisions[1].tree:
        raise InputError(f"--base {args.base} and {revisions[1].name} are the same sources: nothing to compare")
    base, head = compare_build.build_all(root, revisions, say)
    changes = compare_quantities(base, head, limits, kinds, device=device, compile_kernels=args.kernels, say=say)
    if "times" in kinds:
        changes += compare_times(
            base.folder,
            head.folder,
            worker.TIMES,
            device=device,
            threads=args.threads,
            tolerance=limits.time_tolerance,
            say=say,
        )
    facts = {
        "base": f"{args.base} ({revisions[0].commit[:10]})",
        "head": f"{revisions[1].name} ({revisions[1].commit[:10]})",
        "torch": torch.__version__,
        "device": device,
        "threads": args.threads,
    }
    return changes, [], facts

"""`sfm-fast bench`: measure, report, and compare with another commit or result."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, require_package
from ..files import check_output_file, parse_json, write_json, write_text
from ..schema import check
from . import bench_compare, common

NAME = "bench"
SUMMARY = "Measure time and memory beside torch and LGM; write tables and a page; gate changes."
EXAMPLE = (
    "sfm-fast bench --preset laptop --out bench\n"
    "  sfm-fast bench --preset imagenet-1k --predict\n"
    "  sfm-fast bench report bench/laptop.json --out page.html\n"
    "  sfm-fast bench compare --base main"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        metavar="NAME",
        default="laptop",
        help="laptop, imagenet-100, imagenet-1k (GPU or --predict), full (every size of the losses), small",
    )
    common.add_list_argument(
        parser,
        "--suite",
        metavar="NAME",
        help="only these of losses, images, step, loading, scaling, startup; the result's other rows stay",
    )
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only cases whose name contains this; the result's other rows stay"
    )
    parser.add_argument("--predict", action="store_true", help="count memory and operations of steps, run nothing")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the backbone in steps")
    parser.add_argument("--device", default="auto", help="torch device: auto, cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--out", metavar="FOLDER", default="bench", help="folder of PRESET.json, .md, .csv and .html, made if missing"
    )
    actions = parser.add_subparsers(title="or", dest="action", metavar="")
    report = actions.add_parser("report", help="tables, CSV and one page of results that are there")
    report.add_argument("results", nargs="+", metavar="RESULT.json", help="results of `sfm-fast bench`")
    report.add_argument("--out", metavar="FILE", default="bench.html", help="the page")
    report.add_argument("--markdown", metavar="FILE", help="also the tables as Markdown")
    report.add_argument("--csv", metavar="FILE", help="also the rows as CSV")
    report.add_argument("--claims", metavar="CLAIMS.json", help="claims to show on the page")
    report.set_defaults(run=run_report)
    compare = actions.add_parser(
        "compare",
        help="two commits or two results: exit code 1 on a regression",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench_compare.add_arguments(compare)
    compare.set_defaults(run=bench_compare.run)
    for sub in (report, compare):
        sub.add_argument("--json", metavar="FILE", help="write the whole result as JSON here ('-': to stdout)")


def run(args: argparse.Namespace) -> None:
    require_package("pytest", "benchmarks", "bench")
    from sfm_fast.benchmarks.report import page, rows, tables

    from ..backbones.load import resolve_device
    from ..benchmarks import runner as suites

    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {args.out}: is a file, wanted a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: can't be made ({error.strerror})") from error
    path = folder / f"{args.preset}{'-predicted' if args.predict else ''}.json"
    check_output_file(path, "--out")
    before = rows.read_result(path) if (args.only or args.suite) and path.exists() else None
    result: dict[str, Any] | None = None
    # A whole run takes the old result's place at its end alone; what an interrupted one has measured stays beside it.
    part = path if before else path.with_suffix(".part.json")
    for fresh, result in suites.run(
        args.preset,
        device,
        suites=args.suite or (),
        only=args.only,
        predict=args.predict,
        compile=args.compile,
        before=before,
    ):
        write_json(part, result)
        common.say(args, "", tables.rows_table(fresh))
    if result is None:
        raise InputError(f"--only {args.only!r}: no case of preset {args.preset} has this in its name")
    part.replace(path)
    shown = page.write_all(folder, path.stem, result)
    common.finish(args, result, "", f"{len(result['rows'])} rows in {path}; look at {shown.resolve()}")


def run_report(args: argparse.Namespace) -> None:
    from sfm_fast.benchmarks.report import page, rows, tables

    for option in ("out", "markdown", "csv"):
        if getattr(args, option):
            check_output_file(getattr(args, option), f"--{option}")
    results = [rows.read_result(path) for path in args.results]
    claims = None
    if args.claims:
        try:
            value = parse_json(Path(args.claims).read_text(encoding="utf-8"))
            claims = check(args.claims, value, {"claims": [dict]}, "claims")["claims"]
        except InputError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"--claims {args.claims}: wanted the JSON of the claims ({error!r})") from error
    page.write_page(Path(args.out), results, claims)
    if args.markdown:
        write_text(args.markdown, "\n\n".join(tables.markdown(result) for result in results) + "\n")
    if args.csv:
        write_text(args.csv, tables.csv_text(*results))
    common.finish(args, {"results": results, "page": str(args.out)}, f"look at {Path(args.out).resolve()}")

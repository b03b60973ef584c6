"""The command of the benchmarks, `sfm-fast bench` or `python -m benchmarks`: measure, report, and compare two results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sfm_fast.arguments import add_list, check_names, finish, say, use_threads
from sfm_fast.errors import InputError, require_package
from sfm_fast.files import check_output_file, write_json, write_text

from . import names

# What loads torch is imported where it is used, so that help and usage errors take no time.
SUMMARY = "Measure time and memory beside torch and LGM; write tables and a page; compare two results."
EXAMPLE = (
    "sfm-fast bench --preset laptop --out bench\n"
    "  sfm-fast bench --preset imagenet-1k --predict\n"
    "  sfm-fast bench report bench/laptop.json --out page.html\n"
    "  sfm-fast bench compare old/laptop.json new/laptop.json"
)
COULD_NOT_COMPARE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = "; ".join(f"{name}: {preset.about}" for name, preset in names.PRESETS.items())
    parser.add_argument("--preset", metavar="NAME", default="laptop", help=known)
    add_list(
        parser,
        "--suite",
        metavar="NAME",
        help=f"only these of {', '.join(names.SUITES)}; the result's other rows stay",
    )
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only cases whose name contains this; the result's other rows stay"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run has left in --out")
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
    _add_compare(
        actions.add_parser(
            "compare",
            help="two results: exit code 1 on a regression",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    for sub in actions.choices.values():
        sub.add_argument("--json", metavar="FILE", help="write the whole result as JSON here ('-': to stdout)")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="result files of `sfm-fast bench`: base, then head")
    add_list(parser, "--only", metavar="KIND", default=",".join(names.KINDS), help="what to compare")
    parser.add_argument(
        "--tolerance", type=float, metavar="F", default=0.01, help="fraction that bytes and operations may grow"
    )
    parser.add_argument(
        "--time-tolerance", type=float, metavar="F", default=0.1, help="fraction that ratios of times may get worse"
    )
    parser.add_argument("--allow-missing", action="store_true", help="what only the base has is no regression")
    parser.add_argument("--markdown", metavar="FILE", help="write the table here too, such as for $GITHUB_STEP_SUMMARY")
    parser.set_defaults(run=run_compare)


def run(args: argparse.Namespace) -> None:
    """Measure a preset, and write its result and its reports."""
    from sfm_fast.backbones.load import resolve_device

    from . import rows, runner
    from .registry import Options
    from .report import page, tables

    use_threads(args.threads)
    device = resolve_device(args.device)
    path = _folder(args.out) / f"{args.preset}{'-predicted' if args.predict else ''}.json"
    check_output_file(path, "--out")
    some = bool(args.only or args.suite)
    # A whole run replaces the old result only at its end; an interrupted run's measurements stay next to it.
    part = path if some and path.exists() else path.with_suffix(".part.json")
    if args.resume and not part.exists():
        raise InputError(f"--resume: {part} is not there, so nothing was interrupted")
    ran = False
    for fresh, _ in runner.run(
        args.preset,
        device,
        lambda result: write_json(part, result.to_json()),
        chosen=args.suite or (),
        only=args.only,
        options=Options(args.predict, args.compile),
        before=rows.read_result(part) if args.resume or part == path else None,
        again=not args.resume,
    ):
        ran = True
        say(args, "", tables.rows_table(fresh))
    if not ran and not args.resume:
        raise InputError(f"--only {args.only!r}: no case of preset {args.preset} has this in its name")
    part.replace(path)
    result = rows.read_result(path)
    shown = page.write_all(path.parent, path.stem, result)
    finish(args, result.to_json(), "", f"{len(result.rows)} rows in {path}; look at {shown.resolve()}")


def _folder(name: str) -> Path:
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {name}: is a file, wanted a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {name}: can't be made ({error.strerror})") from error
    return folder


def run_report(args: argparse.Namespace) -> None:
    """Write the page, and the other requested forms, of existing results."""
    from . import rows
    from .report import page, tables

    for option in ("out", "markdown", "csv"):
        if getattr(args, option):
            check_output_file(getattr(args, option), f"--{option}")
    results = [rows.read_result(path) for path in args.results]
    page.write_page(Path(args.out), results, rows.read_claims(args.claims) if args.claims else None)
    if args.markdown:
        write_text(args.markdown, "\n\n".join(tables.markdown(result) for result in results) + "\n")
    if args.csv:
        write_text(args.csv, tables.csv_text(*results))
    whole = {"results": [result.to_json() for result in results], "page": str(args.out)}
    finish(args, whole, f"look at {Path(args.out).resolve()}")


def run_compare(args: argparse.Namespace) -> None:
    """Compare two results; exit code 1 if something got worse, 2 if nothing could be compared."""
    try:
        regressions = _compare(args)
    except (InputError, OSError) as error:
        print(f"sfm-fast bench compare: {error}", file=sys.stderr)
        raise SystemExit(COULD_NOT_COMPARE) from error
    if regressions:
        raise SystemExit(1)


def _compare(args: argparse.Namespace) -> int:
    from . import compare, rows

    limits = compare.Limits(args.tolerance, args.time_tolerance, args.allow_missing)
    kinds = check_names("--only", args.only, compare.KINDS)
    if not kinds:
        raise InputError(f"--only: an empty list; wanted some of {', '.join(compare.KINDS)}")
    if args.markdown:
        check_output_file(args.markdown, "--markdown")
    if len(args.files) != 2:
        raise InputError(f"wanted two result files, base and head, got {len(args.files)}")
    base, head = (rows.read_result(path) for path in args.files)
    changes, notes = compare.compare_files(base, head, limits, kinds)
    if all(change.verdict == compare.NOT_COMPARED for change in changes):
        raise InputError("; ".join(["nothing could be compared", *notes]))
    text = compare.table(changes)
    lines = [*notes, *([text, ""] if text else []), compare.summary(changes)]
    if args.markdown:
        title = f"### {args.files[0]} → {args.files[1]}"
        parts = [title, compare.summary(changes), *notes, *([text] if text else [])]
        write_text(args.markdown, "\n\n".join(parts) + "\n")
    finish(args, compare.to_json(changes, notes, *args.files), *lines)
    return compare.count(changes, compare.REGRESSION)


def main() -> int:
    """The command without the rest of `sfm-fast`; bad input ends with code 1 and one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=SUMMARY)
    add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the whole result as JSON here ('-': to stdout)")
    parser.set_defaults(run=run)
    args = parser.parse_args()
    try:
        require_package("timm", "benchmarks", "bench")
        args.run(args)
    except (InputError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0

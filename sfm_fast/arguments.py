"""Shared by all command lines: list options, options that a dataclass declares, and output as text and JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import InputError
from .files import write_json
from .options import options_of

Name = TypeVar("Name", str, int)
Made = TypeVar("Made")


class Listed(argparse.Action):
    """Values separated by commas or spaces, or given by repeating the option; the first use replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest)
        given = [value for one in values for value in one]
        setattr(namespace, self.dest, given if earlier is self.default else earlier + given)


def add_list(parser: argparse.ArgumentParser, option: str, kind: Callable[[str], Any] = str, **options: Any) -> None:
    """Add an option that takes a list of ``kind``, separated by commas or spaces ('' is the empty list); its default is such a string, or None."""

    def values(text: str) -> list[Any]:
        return [kind(word) for word in text.replace(",", " ").split()]

    values.__name__ = kind.__name__  # argparse's error message shows this name
    parser.add_argument(option, nargs="+", type=values, action=Listed, **options)


def check_names(option: str, names: Sequence[Name], known: Sequence[Name], before: str = "") -> list[Name]:
    """``names`` without duplicates, in the order given; raises ``InputError`` for one that isn't ``known``.

    ``before``: command and positional arguments, such as "sfm-fast eval RUN". If the unknown name looks like a path, the message
    shows how to write them before ``option``, whose list takes all words that follow it.
    """
    for name in names:
        if name not in known:
            swallowed = before and ("/" in str(name) or os.path.lexists(str(name)))
            hint = f"; if it is a {before.split()[-1]}, write: {before} {option} ..." if swallowed else ""
            raise InputError(f"{option}: {name!r} is none of {', '.join(map(str, known))}{hint}")
    return list(dict.fromkeys(names))


def add_options(parser: argparse.ArgumentParser, kind: type, /, *names: str, **flags: str) -> None:
    """Add an option for each field (or each of ``names``) of a dataclass with `sfm_fast.options`; its value is None unless given.

    ``flags``: fields whose option has another name on the command line. `given_options` reads the values.
    """
    for name, one in options_of(kind).items():
        if names and name not in names:
            continue
        default = getattr(kind, name)
        usual = one.usual or (f"{default:g}" if isinstance(default, float) else str(default))
        flag = flags.get(name, f"--{name.replace('_', '-')}")
        if isinstance(default, bool) or one.flag:
            usual = one.usual or ("yes" if default else "no")
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, dest=name, action=action, default=None, help=f"{one.help} (default: {usual})")
            continue
        parser.add_argument(
            flag,
            dest=name,
            type=str if one.choices else int if one.least is not None else float,
            choices=one.choices or None,
            metavar=one.metavar,
            help=f"{one.help} (default: {usual})".replace("%", "%%"),
        )


def given_options(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of the dataclass ``kind`` that were given on the command line, with their values."""
    values = ((name, getattr(args, name, None)) for name in options_of(kind))
    return {name: value for name, value in values if value is not None}


def made(args: argparse.Namespace, kind: type[Made], make: Callable[..., Made] | None = None) -> Made:
    """An object of the dataclass ``kind`` from the options given, by ``make`` instead of its constructor; errors name the option as on the command line."""
    try:
        return (make or kind)(**given_options(args, kind))
    except InputError as error:
        name, _, rest = str(error).partition(" ")
        if name not in options_of(kind):
            raise
        raise InputError(f"--{name.replace('_', '-')} {rest}") from error


def use_threads(threads: int | None) -> None:
    """Apply --threads; None leaves torch's choice."""
    check_threads(threads)
    if threads is not None:
        import torch  # not at the start of a command line, which may only have to print its help

        torch.set_num_threads(threads)


def check_threads(threads: int | None) -> None:
    """Raise ``InputError`` unless ``threads`` is None or positive."""
    if threads is not None and threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")


def say(args: argparse.Namespace, *lines: str) -> None:
    """Print text: to stderr if stdout carries JSON."""
    print(*lines, sep="\n", file=sys.stderr if args.json == "-" else sys.stdout, flush=True)


def finish(args: argparse.Namespace, result: Mapping[str, Any], *lines: str) -> None:
    """Write ``result`` to the file of --json, then print ``lines``, even if writing fails."""
    try:
        write_result(args, result)
    finally:
        say(args, *lines)


def write_result(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write ``result`` as JSON to the file of --json, or to stdout for '-'; nothing without --json."""
    if args.json == "-":
        print(json.dumps(result, indent=2, allow_nan=False), flush=True)
    elif args.json:
        write_json(args.json, result)

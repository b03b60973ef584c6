"""Options as fields of a dataclass, each declared once with its allowed values and its help text for command lines."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Option:
    """Allowed values and help of one field.

    help, usual, metavar: for command lines; ``usual`` describes a default such as None that doesn't explain itself.
    choices: the allowed strings. flag: True or False, for a field whose default is neither. least, most: limits of an integer; ``most`` without ``least``: limit of a positive real number.
    within: an interval of real numbers, such as "(0, 1]".
    """

    help: str = ""
    usual: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    flag: bool = False
    least: int | None = None
    most: float | None = None
    within: str = ""

    def problem(self, value: Any) -> str:
        """What ``value`` must be, for a message; "" if it is allowed."""
        if self.flag:
            return "" if isinstance(value, bool) else "True or False"
        if self.choices:
            return "" if isinstance(value, str) and value in self.choices else f"one of {self.choices}"
        if self.within:
            low, high = (float(end) for end in self.within[1:-1].split(","))
            number = number_of(value)
            above = number > low or (number == low and self.within[0] == "[")
            return (
                "" if above and (number < high or (number == high and self.within[-1] == "]")) else f"in {self.within}"
            )
        if self.least is not None:
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                return "a whole number"
            if int(value) < self.least:
                return f"at least {self.least}"
            return f"at most {self.most}" if self.most is not None and int(value) > self.most else ""
        if self.most is not None:
            return "" if 0 < number_of(value) <= self.most else f"positive and at most {self.most:g}"
        return ""


def number_of(value: object) -> float:
    """``value`` as a float, NaN if it is no real number (NumPy's are, True and False aren't), so that no range contains it."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)  # before any comparison, because NumPy would make a limit float16 for a float16
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def option(default: Any, help: str = "", **limits: Any) -> Any:
    """A dataclass field with this default; ``help`` and ``limits`` as in `Option`."""
    return field(default=default, metadata={"option": Option(help, **limits)})


def options_of(kind: type) -> dict[str, Option]:
    """The options of a dataclass by field name, its own before inherited ones."""
    options = [(one.name, one.metadata["option"]) for one in fields(kind) if "option" in one.metadata]
    return dict(sorted(options, key=lambda pair: pair[0] not in kind.__annotations__))


def check_options(value: Any) -> None:
    """Raise ``InputError`` for the first option of a dataclass object whose value isn't allowed; None is allowed if it is the default.

    Numbers of other packages, such as NumPy's, are converted to Python's, which JSON can hold.
    """
    defaults = {one.name: one.default for one in fields(value)}
    for name, one in options_of(type(value)).items():
        given, default = getattr(value, name), defaults[name]
        if given is None and default is None:
            continue
        wanted = one.problem(given)
        if isinstance(default, bool) and not isinstance(given, bool):
            wanted = "True or False"
        elif isinstance(default, float) and math.isnan(number_of(given)):
            wanted = wanted or "a number"
        if wanted:
            raise InputError(f"{name} must be {wanted}, got {given!r}")
        if isinstance(given, numbers.Number) and not isinstance(given, (bool, int, float)):
            plain = int(given) if isinstance(given, numbers.Integral) else float(given)  # type: ignore[arg-type]
            object.__setattr__(value, name, plain)  # the dataclasses are frozen

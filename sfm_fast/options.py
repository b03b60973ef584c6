"""Options as fields of a dataclass: each says once what it may be, and what a command line tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Option:
    """What one field may be.

    help, usual, metavar: what a command line says of it; ``usual`` of the default, where the field's own, such as None, tells too little.
    choices: its values. least, most: of a whole number; ``most`` alone: of a positive real number. within: an interval of real
    numbers, such as "(0, 1]".
    """

    help: str = ""
    usual: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: float | None = None
    within: str = ""

    def problem(self, value: Any) -> str:
        """What a message wants instead of ``value``; "" where it is right."""
        if self.choices:
            return "" if isinstance(value, str) and value in self.choices else f"one of {self.choices}"
        if self.within:
            low, high = (float(end) for end in self.within[1:-1].split(","))
            above = isinstance(value, (int, float)) and (value > low or (value == low and self.within[0] == "["))
            return "" if above and (value < high or (value == high and self.within[-1] == "]")) else f"in {self.within}"
        if self.least is not None:
            if not isinstance(value, int) or isinstance(value, bool):
                return "a whole number"
            return f"at least {self.least}" if value < self.least else self._too_many(value)
        if self.most is not None:
            positive = isinstance(value, (int, float)) and 0 < value <= self.most
            return "" if positive else f"positive and at most {self.most:g}"
        return ""

    def _too_many(self, value: float) -> str:
        return f"at most {self.most}" if self.most is not None and value > self.most else ""


def option(default: Any, help: str = "", **limits: Any) -> Any:
    """A field of a dataclass with this default; ``help`` and ``limits`` as of `Option`."""
    return field(default=default, metadata={"option": Option(help, **limits)})


def options_of(kind: type) -> dict[str, Option]:
    """The options of a dataclass by their fields' names, its own before those it inherits."""
    found = [(one.name, one.metadata["option"]) for one in fields(kind) if "option" in one.metadata]
    return dict(sorted(found, key=lambda pair: pair[0] not in kind.__annotations__))


def check_options(value: Any) -> None:
    """Raise ``InputError`` naming the first option of a dataclass object whose value isn't allowed; None is, where it is the default."""
    defaults = {one.name: one.default for one in fields(value)}
    for name, one in options_of(type(value)).items():
        given = getattr(value, name)
        if (given is not None or defaults[name] is not None) and (wanted := one.problem(given)):
            raise InputError(f"{name} must be {wanted}, got {given!r}")

"""The error for mistakes that a user can correct: the command line prints it as one line, without a traceback."""

from __future__ import annotations

import re


class InputError(ValueError):
    """Invalid input: the message names the argument or file, what it must be and what it is; line breaks in it are removed."""

    def __init__(self, message: object) -> None:
        super().__init__(re.sub(r"\s*[\r\n]+\s*", " ", str(message)).strip())


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def require_package(module: str, purpose: str, extra: str) -> None:
    """Raise ``InputError`` naming the extra to install if ``module`` isn't installed."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise InputError(f"{purpose} needs the package {module!r}: pip install 'sfm_fast[{extra}]'")

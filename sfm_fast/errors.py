"""The error a user can mend: the command line prints it as one line, without a traceback."""

from __future__ import annotations

import re


class InputError(ValueError):
    """Bad input: the message names the argument or file, what it got and what it wants, in one line whatever it quotes."""

    def __init__(self, message: object) -> None:
        super().__init__(re.sub(r"\s*[\r\n]+\s*", " ", str(message)).strip())


def require_package(module: str, purpose: str, extra: str) -> None:
    """Raise ``InputError`` that names the extra to install where ``module`` can't be imported."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise InputError(f"{purpose} needs the package {module!r}: pip install 'sfm_fast[{extra}]'")

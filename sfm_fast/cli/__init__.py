"""The command line: one file per command, each parses, calls and prints."""

from __future__ import annotations

import sys


def entry() -> int:
    """Entry point of `sfm-fast`: where a dependency is missing, it names the extra to install."""
    try:
        from .main import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sfm_fast"):
            raise
        print(f"sfm-fast: the command line needs {error.name!r}: pip install 'sfm_fast[distill]'", file=sys.stderr)
        return 1
    return main()

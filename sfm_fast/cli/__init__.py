"""The command line: one file per command declares and checks its options, and one in `runs` does the work and prints."""

from __future__ import annotations


def entry() -> int:
    """Entry point of `sfm-fast`."""
    import os

    from .main import main
    from .threads import bound_spinning

    bound_spinning(os.environ)

    return main()

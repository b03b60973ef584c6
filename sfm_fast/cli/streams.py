"""stdout and stderr that never stop a command: what can't be written is remembered, what can't be shown has a stand-in."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast

# What the package prints beyond ASCII; anything else, such as a class's name, is written with backslashes.
STAND_INS = {
    "…": "...",
    "×": "x",
    "→": "->",
    "–": "-",
    "±": "+/-",
    "²": "2",
    "ᵀ": "^T",
    "‖": "||",
    "λ": "lambda",
    "σ": "sigma",
    "µ": "u",
    "✕": "x",
}
ERRORS = "sfm_fast.stand_in"


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(STAND_INS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error(ERRORS, _stand_in)


class SteadyStream:
    """A text stream whose writes never raise: the first failure is kept as ``failure``, and from then on it is silent."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.failure: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, action: str, *arguments: str) -> None:
        if self.failure is not None:
            return
        try:
            if self.stream is None:  # the process was started without it
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            getattr(self.stream, action)(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.failure = error

    def __getattr__(self, name: str) -> Any:
        return getattr(io.StringIO() if self.stream is None else self.stream, name)

    def let_go(self) -> None:
        """After a failure: what is still buffered must not fail again when the interpreter ends."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self.failure is not None and self.stream is not None:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def steady_streams() -> Iterator[SteadyStream]:
    """While open, sys.stdout (yielded) and sys.stderr are `SteadyStream`, and a warning is one line."""
    _fill_descriptors()
    before = sys.stdout, sys.stderr, warnings.formatwarning
    handlers = [_show_stand_ins(stream) for stream in before[:2]]
    out, err = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    warnings.formatwarning = _one_line
    try:
        yield out
    finally:
        for stream in (out, err):
            stream.flush()
            stream.let_go()
        sys.stdout, sys.stderr, warnings.formatwarning = before
        for stream, errors in zip(before[:2], handlers, strict=True):
            if errors is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def exit_code(code: int, out: SteadyStream) -> int:
    """``code`` of a command that is done, or what says that stdout couldn't be written."""
    out.flush()
    if out.failure is None or code:
        return code
    if isinstance(out.failure, BrokenPipeError):  # the process at the other end of the pipe has ended
        return 128 + signal.SIGPIPE
    print(
        f"sfm-fast: stdout can't be written ({getattr(out.failure, 'strerror', None) or out.failure})", file=sys.stderr
    )
    return 1


def _show_stand_ins(stream: TextIO | None) -> str | None:
    """Make a stream show stand-ins; returns how it dealt with such characters before, None where it isn't one that encodes."""
    if not isinstance(stream, io.TextIOWrapper) or stream.closed:
        return None
    before = stream.errors
    with contextlib.suppress(OSError):  # it flushes first, and a full disk shows at the first write anyway
        stream.reconfigure(errors=ERRORS)
    return before


def _fill_descriptors() -> None:
    """Without stdin, stdout or stderr, the first files that are opened would be taken for them by what prints from C."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"sfm-fast: warning: {' '.join(str(message).split())}\n"

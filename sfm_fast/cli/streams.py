"""stdout and stderr whose failures never stop a command: they are reported at the end, and unencodable characters are replaced."""

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

# The non-ASCII characters that the package itself prints; all others, such as those of class names, become backslash escapes.
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
    """A text stream whose writes never raise: the first failure is kept as ``failure``, and later writes do nothing."""

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
            if self.stream is None:  # the process was started without this stream
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            getattr(self.stream, action)(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.failure = error

    def __getattr__(self, name: str) -> Any:
        return getattr(io.StringIO() if self.stream is None else self.stream, name)

    def let_go(self) -> None:
        """After a failure, discard what is still buffered, which would fail again when the interpreter exits."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self.failure is not None and self.stream is not None:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)


@contextlib.contextmanager
def steady_streams() -> Iterator[SteadyStream]:
    """Within the context, sys.stdout (yielded) and sys.stderr are `SteadyStream`, and each warning is printed as one line."""
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
    """The exit code of a command that ended with ``code``: another one if it succeeded but stdout couldn't be written."""
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
    """Make a stream replace unencodable characters; returns its earlier ``errors`` setting, or None if it doesn't encode."""
    if not isinstance(stream, io.TextIOWrapper) or stream.closed:
        return None
    before = stream.errors
    with contextlib.suppress(OSError):  # it flushes first; a full disk is reported by the next write
        stream.reconfigure(errors=ERRORS)
    return before


def _fill_descriptors() -> None:
    """Open descriptors 0 to 2 if they are closed: otherwise the next file opened would get one, and C code would print into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # open returns the lowest free number


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"sfm-fast: warning: {' '.join(str(message).split())}\n"

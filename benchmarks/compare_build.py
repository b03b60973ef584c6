"""Builds of commits to compare: a worktree for as long as it takes, a real installation into a folder, kept for the next time.

Everything lies in build/compare/ of the checkout: ``builds/KEY`` holds ``sfm_fast`` as pip installs it, and beside it the sources
that the table of compiled kernels is made from. The compiled libraries are kept apart, by what they are compiled from, so that
a commit that changed no C++ is installed in seconds. All commits are checked out in one folder, one after the other:
only files that differ are written, so the second build compiles only what the second commit changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from sfm_fast.errors import InputError
from sfm_fast.files import locked_folder, write_text

KEPT = 12  # builds, some 9 MB each
COMPILED = ("csrc", "setup.py")
BESIDE = ("csrc", "tests/static", "tests/shim")
LOG_LINES = 30


@dataclass(frozen=True)
class Revision:
    """Sources to build: how they were asked for, the commit (for a working tree a passing one) and its tree."""

    name: str
    commit: str
    tree: str


@dataclass(frozen=True)
class Build:
    revision: Revision
    folder: Path  # what PYTHONPATH names

    @property
    def library_bytes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in sorted((self.folder / "sfm_fast").glob("_C*.so"))}


def git(root: Path, *words: str, environment: dict[str, str] | None = None) -> str:
    """What git says. Raises ``InputError`` with its complaint."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, env={**os.environ, **(environment or {})}
        )
    except FileNotFoundError as error:
        raise InputError("comparing commits needs git, which is not installed") from error
    if done.returncode:
        raise InputError(f"git {words[0]}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
    return done.stdout.strip()


def find_checkout(start: Path) -> Path:
    """The top of the checkout that ``start`` lies in. Raises ``InputError`` where that isn't one of this project."""
    try:
        root = Path(git(start, "rev-parse", "--show-toplevel"))
    except InputError as error:
        raise InputError(f"--base needs a git checkout of sfm_fast; {start} is none ({error})") from error
    if not (root / "sfm_fast" / "__init__.py").exists() or not (root / "setup.py").exists():
        raise InputError(f"--base needs a git checkout of sfm_fast; {root} is one of something else")
    return root


def resolve(root: Path, reference: str | None, argument: str) -> Revision:
    """The revision of ``reference``; None is the working tree as it stands, with what isn't committed or tracked yet."""
    if reference is None:
        return _working_tree(root)
    try:
        commit = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    except InputError as error:
        raise InputError(
            f"{argument} {reference!r}: no such commit here (a shallow clone may lack it: git fetch it first)"
        ) from error
    return Revision(reference, commit, git(root, "rev-parse", f"{commit}^{{tree}}"))


def _working_tree(root: Path) -> Revision:
    """A passing commit of all files as they are, through an index of its own: neither index nor branch of the user change."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "index")
        own = Path(git(root, "rev-parse", "--git-path", "index"))
        if (root / own).exists():  # a copy knows which files are unchanged
            shutil.copy(root / own, index)
        environment = {"GIT_INDEX_FILE": str(index)}
        git(root, "add", "--all", environment=environment)
        tree = git(root, "write-tree", environment=environment)
    who = {f"GIT_{role}_{part}": "sfm_fast" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    commit = git(root, "commit-tree", tree, "-m", "working tree", environment=who)
    return Revision("working tree", commit, tree)


def build_all(root: Path, revisions: Sequence[Revision], say: Callable[[str], None]) -> list[Build]:
    """A build of every revision, new or kept from another time.

    Raises ``InputError``: one can't be built (with the end of its log), or another comparison runs in this checkout.
    """
    (root / "build").mkdir(exist_ok=True)
    with locked_folder(root / "build" / "compare") as home:
        kept = home / "builds"
        kept.mkdir(exist_ok=True)
        built = {revision: kept / _key(revision.tree, _toolchain()) for revision in revisions}
        missing = [revision for revision in revisions if not built[revision].exists()]
        if missing:
            with _worktree(root, home / "worktree", missing[0]) as worktree:
                for revision in missing:
                    say(f"building {revision.name} ({revision.commit[:10]})")
                    git(worktree, "checkout", "--quiet", "--force", "--detach", revision.commit)
                    _build(revision, worktree, built[revision], home)
        for folder in built.values():
            os.utime(folder)
        for several in (kept.iterdir(), home.glob("libraries-*")):
            newest = sorted(several, key=lambda folder: folder.stat().st_mtime, reverse=True)
            for folder in newest[KEPT:]:
                shutil.rmtree(folder, ignore_errors=True)
    return [Build(revision, built[revision]) for revision in revisions]


@contextmanager
def _worktree(root: Path, folder: Path, revision: Revision) -> Iterator[Path]:
    def remove() -> None:
        with suppress(InputError):
            git(root, "worktree", "remove", "--force", "--force", str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        git(root, "worktree", "prune")

    remove()  # what a killed comparison may have left
    try:
        git(root, "worktree", "add", "--quiet", "--force", "--detach", str(folder), revision.commit)
        yield folder
    finally:
        remove()


def _build(revision: Revision, worktree: Path, target: Path, home: Path) -> None:
    sources = [name for name in COMPILED if (worktree / name).exists()]
    contents = [git(worktree, "rev-parse", f"HEAD:{name}") for name in sources]
    libraries = home / f"libraries-{_key(*contents, _toolchain())}"
    wanted = "none" if libraries.exists() else "all" if torch.cuda.is_available() else "cpu"
    # Folders of the commit before would hand over files that this one no longer has.
    for folder in (worktree / "build").glob("lib*"):
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(dir=home) as temporary:
        installed, log = Path(temporary, "installed"), Path(temporary, "log")
        command = [
            "-m",
            "pip",
            "install",
            "--verbose",
            "--no-deps",
            "--no-build-isolation",
            "--disable-pip-version-check",
        ]
        with open(log, "w") as output:
            code = subprocess.run(
                [sys.executable, *command, "--no-input", "--target", str(installed), "."],
                cwd=worktree,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SFM_FAST_BUILD": wanted},
            ).returncode
        package = installed / "sfm_fast"
        found = sorted(package.glob("_C*.so"))
        # The installation itself goes on without a library that can't be compiled.
        if code or not package.is_dir() or (wanted != "none" and "csrc" in sources and not found):
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise InputError(
                "\n".join([f"{revision.name} ({revision.commit[:10]}) can't be built; its log ends:", *lines])
            )
        if wanted == "none":
            os.utime(libraries)
            for path in libraries.iterdir():
                shutil.copy2(path, package)
        else:
            copied = Path(temporary, "libraries")
            copied.mkdir()
            for path in found:
                shutil.copy2(path, copied)
            copied.rename(libraries)
        for name in BESIDE:
            if (worktree / name).is_dir():
                shutil.copytree(worktree / name, installed / name)
        write_text(installed / "commit", revision.commit + "\n")
        installed.rename(target)


def _toolchain() -> str:
    """What else decides how a library comes out."""
    compiler = os.environ.get("CXX", "c++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    except OSError:
        version = "none"
    flags = [f"{name}={os.environ.get(name, '')}" for name in ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")]
    return "\n".join([torch.__version__, sys.version, str(torch.cuda.is_available()), compiler, version, *flags])


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

"""Files that are written whole or not at all, and folders to work in; what a killed process left of them is removed.

It imports nothing of ours, so that everybody may import it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

UNFINISHED = ".unfinished"  # how the name of a file ends until it is whole
WORK = "onnx-spdy-"  # how the name of a folder to work in starts; both hold the number of their process
_OWNED = re.compile(rf"(?:{WORK}|\..*\.)(?P<pid>\d+)-\w+(?:{re.escape(UNFINISHED)})?", re.DOTALL)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and vanishes when it doesn't.

    Raises:
        OSError: it can't be written, also where a library that writes it in the block doesn't say which file that is.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
        make_folder(path.parent)
        remove_left(path.parent, f".{glob.escape(path.name)}.*{UNFINISHED}")
        prefix = f".{path.name}.{os.getpid()}-"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=UNFINISHED, dir=path.parent)
        temporary = Path(name)
        try:
            _hold(handle)
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)
    except OSError as exc:
        if exc.filename is not None and not str(exc.filename).endswith(UNFINISHED):
            raise
        raise OSError(exc.errno or errno.EIO, exc.strerror or f"it can't be written: {exc}", str(path)) from exc


class WorkFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder of this process. Those of processes that are gone are removed when one is made."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        remove_left(parent, f"{WORK}*")
        super().__init__(prefix=f"{WORK}{os.getpid()}-", dir=parent)
        self._handle: int | None = hold_folder(self.name)

    def cleanup(self) -> None:
        """Remove it, with all that is in it."""
        super().cleanup()
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        OSError: it can't be made; a file in its place is called that.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as exc:
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(folder)) from exc


def hold_folder(folder: str | os.PathLike[str]) -> int:
    """Show other processes that this one uses a folder, until it ends or closes the descriptor that is returned."""
    handle = os.open(folder, os.O_RDONLY)
    _hold(handle)
    return handle


def remove_left(folder: Path, pattern: str) -> None:
    """Remove files and work folders of this user's processes that are gone.

    A process in another container has a number that isn't known here: it is known by its lock.
    """
    for left in folder.glob(pattern):
        owned = _OWNED.fullmatch(left.name)
        if not owned or psutil.pid_exists(int(owned["pid"])):
            continue
        with contextlib.suppress(OSError):  # somebody else's, or removed meanwhile
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_uid == os.getuid():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def _hold(handle: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: the process's number has to do
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(path: Path) -> None:
    """What was written there survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

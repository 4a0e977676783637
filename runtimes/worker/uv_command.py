"""Where `uv` is, which gives a process its own Python and packages."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

FOLDERS = (".local/bin", ".cargo/bin")  # of the home, where uv's installers put it


def find_uv() -> str | None:
    """The path of uv: of the Python package that we depend on, else on PATH, else where its installers put it."""
    with contextlib.suppress(ImportError, FileNotFoundError):  # this package was sent here, without what it depends on
        from uv import find_uv_bin

        return os.fsdecode(find_uv_bin())
    folders = [os.environ.get("PATH", os.defpath), *(str(Path.home() / folder) for folder in FOLDERS)]
    return shutil.which("uv", path=os.pathsep.join(folders))

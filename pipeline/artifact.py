"""Files that the stages leave: JSON with a format, a version and what made it; never half-written.

Every artifact is refused when it is not what it says, or when it was made from something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class ArtifactError(ValueError):
    """A file of an earlier stage is damaged, of another version, or made from something else."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and vanishes when it doesn't."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path, kind: str, version: int, content: Mapping[str, Any]) -> None:
    """Write `content` under `format: onnx_spdy.<kind>` and `version`, atomically."""
    document = {"format": f"onnx_spdy.{kind}", "version": version, **content}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf8")


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The content of a file written by `write_json` with this kind and version.

    Raises:
        ArtifactError: missing, not JSON, another format or another version; the message names the file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf8"))
    except OSError as exc:
        raise ArtifactError(f"{path} can't be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise ArtifactError(f"{path} is not JSON ({exc}); delete it to have it made again") from exc
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else None
    if found != (f"onnx_spdy.{kind}", version):
        raise ArtifactError(f"{path} is not onnx_spdy.{kind} version {version} but {found}; give the right file")
    return document


def check_same(path: Path, what: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse an artifact that was made from something else.

    Args:
        path: the artifact, for the message.
        what: name -> (value in the artifact, value of this run).
    Raises:
        ArtifactError: at least one pair differs; the message gives the first with both values.
    """
    for name, (theirs, ours) in what.items():
        if theirs != ours:
            raise ArtifactError(
                f"{path} belongs to another run: its {name} is {_short(theirs)}, this run's is {_short(ours)}; "
                "choose another folder or delete the file"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash of named arrays: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

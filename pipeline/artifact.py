"""Files that the stages leave: JSON with a format, a version, what made it and a checksum; never half-written.

Each is refused when it is not what it says, when somebody changed it, or when it was made from something else.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from onnx_spdy.runtimes.atomic import UNFINISHED, make_folder, remove_left, replacing
from onnx_spdy.runtimes.errors import OnnxSpdyError

LOCK = ".lock"
CHECKSUM = "sha256"  # of everything else in a file
WRONG_FIELD = (LookupError, TypeError, AttributeError, ValueError, OverflowError)  # what it raises when it is used


class ArtifactError(OnnxSpdyError, ValueError):
    """A file of an earlier stage is damaged, of another version, or made from something else."""


class FolderInUse(ArtifactError):
    """Another process works in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works in this folder meanwhile; the same thread may lock it again. What killed work left is removed.

    Raises:
        FolderInUse: somebody does now.
    """
    make_folder(folder)
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUse(
            f"another command works in {folder} now; wait for its end, or choose another folder"
        ) from None
    try:
        remove_left(folder, f".*{UNFINISHED}")
        yield
    finally:
        lock.release()


def write_json(path: Path | str, kind: str, version: int, content: Mapping[str, Any]) -> None:
    """Write `content` under `format: onnx_spdy.<kind>` and `version`, with its checksum, atomically."""
    # As it is read again: tuples are lists then, and keys are text.
    document = json.loads(json.dumps({"format": f"onnx_spdy.{kind}", "version": version, **content}, allow_nan=False))
    with replacing(path) as temporary:
        text = json.dumps({**document, CHECKSUM: _checksum(document)}, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically.

    Raises:
        OSError: it can't be written.
    """
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as exc:  # what a full disk is called there
            raise OSError(errno.EIO, str(exc)) from exc


def read_json(path: Path | str, kind: str, version: int) -> dict[str, Any]:
    """The content of a file written by `write_json` with this kind and version.

    Raises:
        ArtifactError: missing, not JSON, another format or another version, or changed since; the message names the
            file.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf8"))
    except OSError as exc:
        raise ArtifactError(f"{path} can't be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{path} is not JSON ({exc}); delete it to have it made again") from exc
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else None
    if found != (f"onnx_spdy.{kind}", version):
        raise ArtifactError(f"{path} is not onnx_spdy.{kind} version {version} but {found}; give the right file")
    if CHECKSUM not in document:
        raise ArtifactError(f"{path} has no checksum: an earlier version wrote it; delete it to have it made again")
    if document.pop(CHECKSUM) != _checksum(document):
        raise ArtifactError(f"{path} is not as it was written: its checksum differs; delete it to have it made again")
    return document


D = TypeVar("D", bound="Document")


@dataclass(frozen=True)
class Document:
    """What a file of JSON holds, without its format and version.

    Attributes:
        content: the document.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1

    content: Mapping[str, Any]

    def save(self, path: Path | str) -> None:
        write_json(path, self.KIND, self.VERSION, self.content)

    @classmethod
    def load(cls: type[D], path: Path | str) -> D:
        """The one in a file.

        Raises:
            ArtifactError: missing, damaged or of another version.
        """
        return cls(read_json(path, cls.KIND, cls.VERSION))


@contextmanager
def fields_of(path: Path | str) -> Iterator[None]:
    """What is missing or mistyped in a file that is read in this block is told by the file's name.

    Raises:
        ArtifactError: instead of what a field that isn't there, or is of another type, raises.
    """
    try:
        yield
    except WRONG_FIELD as exc:
        if isinstance(exc, ArtifactError):
            raise
        text = " ".join(str(exc).split())
        raise ArtifactError(f"{path} has a missing or wrong field ({type(exc).__name__}: {text}); delete it") from exc


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


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
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()

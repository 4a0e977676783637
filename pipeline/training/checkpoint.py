"""Checkpoint: where a training is, in a file from which it goes on. Tensors and plain numbers, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from onnx_spdy.pipeline.artifact import CHECKSUM, ArtifactError, arrays_sha256, check_same, write_tensors

VERSION = 4


class Checkpoint:
    """A file from which a training goes on.

    Args:
        path: of the safetensors file.
        made_from: what the training belongs to, name -> value.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self.path, self.made_from = path, {name: str(value) for name, value in made_from.items()}

    def check(self) -> None:
        """Raises ArtifactError: the file that is there is damaged or belongs to another training."""
        if self.path.exists():
            theirs = self._header().get("made_from", {})
            check_same(self.path, {name: (theirs.get(name), value) for name, value in self.made_from.items()})

    def belongs(self) -> bool:
        """Whether there is a file, of this training."""
        return self.path.exists() and self._header().get("made_from") == self.made_from

    def replace_other(self) -> None:
        """Remove the file that is there if it is of another training."""
        if not self.belongs():
            self.path.unlink(missing_ok=True)

    def write(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Replace the file."""
        contiguous = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        header = {
            "format": "onnx_spdy.training", "version": VERSION, "made_from": self.made_from,
            "tensors_sha256": _sha256(contiguous), **numbers,
        }  # fmt: skip
        text = json.dumps(header)
        write_tensors(self.path, contiguous, {"training": text, CHECKSUM: _text_sha256(text)})

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Raises ArtifactError: see `check`."""
        self.check()
        header = self._header()
        with safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterator
        if _sha256(tensors) != header.get("tensors_sha256"):
            raise ArtifactError(f"{self.path} is not as it was written: its checksum differs; delete it to start again")
        return tensors, header

    def _header(self) -> dict[str, Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
            text = metadata.get("training", "{}")
            header = json.loads(text)
        except (OSError, SafetensorError, ValueError) as exc:
            raise ArtifactError(f"{self.path} can't be read ({exc}); delete it to start again") from exc
        if (header.get("format"), header.get("version")) != ("onnx_spdy.training", VERSION):
            raise ArtifactError(f"{self.path} is no checkpoint of a training of version {VERSION}; delete it")
        if metadata.get(CHECKSUM) != _text_sha256(text):
            raise ArtifactError(f"{self.path} is not as it was written: its checksum differs; delete it to start again")
        return header


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    return arrays_sha256({name: value.numpy(force=True) for name, value in tensors.items()})

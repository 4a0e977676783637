"""The small network that the trials prune, its data, the call that prunes it in two seconds, and what that leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_spdy.tools.fuzz.child import Ended, Outcome, ended
from onnx_spdy.tools.fuzz.graphs import example

TINY = """
<ir_version: 9, opset_import: ["" : 18]>
tiny (float[batch, 3, 8, 8] input) => (float[batch, 10] y)
<float[32, 3, 3, 3] w1, float[32] b1, float[32, 32, 3, 3] w2, float[32] b2, int64[2] axes = {2, 3},
 float[10, 32] w3, float[10] b3>
{
    [conv1] c = Conv <pads = [1, 1, 1, 1]> (input, w1, b1)
    [relu1] r = Relu (c)
    [conv2] d = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)
    [relu2] s = Relu (d)
    [mean] m = ReduceMean <keepdims = 0> (s, axes)
    [fc] y = Gemm <transB = 1> (m, w3, b3)
}
"""
SAMPLES = 32
NETWORK, DATA, OUT = "net.onnx", "data.npz", "out"
RUN = (
    "run", NETWORK, "--data", DATA, "--runtime", "fake", "--batch", "64", "--speedup", "1.6", "--eval", DATA,
    "--finetune", "gap", "--search-images", "1000", "--out", OUT,
)  # fmt: skip
TIMES = {"stages", "seconds", "elapsed_seconds", "sha256"}  # fields that no two runs have in common
NO_RESULTS = {".lock", "report.html", "front.html", "front.svg"}


def make(folder: Path, seed: int = 0) -> Path:
    """A folder with the network and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    onnx.save(example(TINY, rng), folder / NETWORK)
    images = rng.standard_normal((SAMPLES, 3, 8, 8)).astype(np.float32)
    np.savez(folder / DATA, input=images, target=rng.integers(0, 10, SAMPLES))
    return folder


def prune(folder: Path, arguments: Sequence[str] = RUN) -> Ended:
    """Run it.

    Raises:
        RuntimeError: the undamaged network isn't pruned.
    """
    done = ended(arguments, folder, folder / "printed")
    if done.code != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {done.text}")
    return done


def cleared(outcome: Outcome, case: Path, number: int, keep: Path | None) -> Outcome:
    """The outcome of a trial, whose folder is removed; where it made trouble, `keep` gets a copy under its number."""
    if outcome.trouble and keep is not None:
        shutil.copytree(case, keep / str(number), symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(case)
    return outcome


def results(folder: Path) -> dict[str, Any]:
    """Path -> what that file says, times apart, of everything that a run leaves."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in NO_RESULTS)
    return {str(file.relative_to(folder)): _said(file) for file in files}


def _said(file: Path) -> Any:
    data = file.read_bytes()
    if file.suffix == ".json":
        document = json.loads(data)
        # Seconds of a latency table are what it is about, and no times of this run: a formula makes them.
        return document if file.name == "latency.json" else _without_times(document)
    if file.name == "repair.safetensors":  # it holds how long it took
        length = int.from_bytes(data[:8], "little")
        data = data[8 + length :]
    return hashlib.sha256(data).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items() if key not in TIMES}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The files that differ or are missing."""
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]

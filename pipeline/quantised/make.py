"""Files in int8, made once and kept; a tool that is missing or fails is a reason, never the end of a run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_spdy.models import fixed_batch, load_model, model_sha256, save_model
from onnx_spdy.models.graph import ModelError, one_line
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.runtimes.atomic import WorkFolder
from onnx_spdy.runtimes.errors import OnnxSpdyError

SAMPLES = 300  # what the tools' own pages advise
LARGEST_SAMPLES_BYTES = 2**30
CALIBRATION_SECONDS = 60  # then no more samples
LONGEST_SECONDS = 600
MADE_FROM = "onnx_spdy.made_from"


@dataclass(frozen=True)
class Quantiser:
    """A tool that makes an int8 network.

    Attributes:
        name: what its result is called, by the engine that it is made for.
        tool: the module in this folder.
        packages: what it and the runtime need, itself first.
        install: what brings them.
        specs: what the result is called in a runtime -> that runtime, as for `open_runtime`. What isn't quantised is in
            the precision that is named there.
    """

    name: str
    tool: str
    packages: tuple[str, ...]
    install: str
    specs: Mapping[str, str]


QUANTISERS = (
    Quantiser("onnxruntime int8", "ort_static", ("onnxruntime",), "onnxruntime", {"onnxruntime int8": "onnxruntime"}),
    Quantiser(
        "openvino int8",
        "nncf_quantize",
        ("nncf", "openvino"),
        "onnx-spdy[int8]",
        {"openvino int8": "openvino:fp32", "openvino int8+bf16": "openvino:bf16"},
    ),
)


class QuantisationFailed(OnnxSpdyError, RuntimeError):
    """A tool is missing, or gave no network in int8; the message is its reason in one line."""


@dataclass(frozen=True)
class Quantised:
    """A network in int8, in all forms.

    Attributes:
        files: name of a quantiser -> its file.
        missing: name of a quantiser -> why it has none.
    """

    files: Mapping[str, Path]
    missing: Mapping[str, str]


NOTHING = Quantised({}, {})


def quantise_all(
    model: Path,
    samples: Samples,
    stem: Path,
    quantisers: Sequence[Quantiser] = QUANTISERS,
    progress: Progress = ignore,
) -> Quantised:
    """Make a network's int8 files, or take those that are there and were made from the same.

    Args:
        model: an ONNX file in floating point.
        samples: calibration samples.
        stem: where they go: `stem` and the quantiser's name.
        progress: called with (batches read, batches, name of the quantiser).
    """
    files, missing = {}, {}
    for quantiser in quantisers:
        out = stem.with_name(f"{stem.name}-{quantiser.name.replace(' ', '-')}.onnx")
        try:
            quantise(model, samples, out, quantiser, progress)
            files[quantiser.name] = out
        except QuantisationFailed as exc:
            missing[quantiser.name] = str(exc)
    return Quantised(files, missing)


def quantise(model: Path, samples: Samples, out: Path, quantiser: Quantiser, progress: Progress = ignore) -> None:
    """One of these files; see `quantise_all`.

    Raises:
        QuantisationFailed: the tool isn't there, or fails.
    """
    if absent := [name for name in quantiser.packages if importlib.util.find_spec(name) is None]:
        raise QuantisationFailed(f"{absent[0]} is not installed; pip install '{quantiser.install}'")
    dense = load_model(model)
    made_from = f"{model_sha256(dense)} {samples.sha256} {quantiser.tool} {version(quantiser.packages[0])}"
    if _made_from(out) == made_from:
        return
    with WorkFolder() as folder:
        work = Path(folder)
        save_model(dense, work / "dense.onnx")
        inputs, count = _place(samples, fixed_batch(dense) or 1, work)
        request = {"tool": quantiser.tool, "model": str(work / "dense.onnx"), "inputs": inputs,
                   "out": str(work / "int8.onnx"), "seconds": CALIBRATION_SECONDS}  # fmt: skip
        _work(request, work, lambda read, of: progress(read, of, quantiser.name))
        try:
            made = load_model(work / "int8.onnx")
        except ModelError as exc:
            raise QuantisationFailed(f"{quantiser.packages[0]} wrote no network: {exc}") from exc
    made.metadata_props.append(onnx.StringStringEntryProto(key=MADE_FROM, value=made_from))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(made, out)
    progress(count, count, quantiser.name)


def _made_from(path: Path) -> str | None:
    """What a kept file was made from; None where there is none, or a damaged one, which is made again."""
    if path.exists():
        with contextlib.suppress(ModelError):
            return next((one.value for one in load_model(path).metadata_props if one.key == MADE_FROM), None)
    return None


def _place(samples: Samples, batch: int, folder: Path) -> tuple[dict[str, str], int]:
    """Calibration batches as files of (batches, shape of a batch), by input, and how many they are."""
    each = sum(array.nbytes for array in samples.inputs.values()) / len(samples)
    most = max(1, min(SAMPLES, len(samples), int(LARGEST_SAMPLES_BYTES / max(each, 1))) // batch)
    chosen = [samples.take(np.arange(start, start + batch) % len(samples)) for start in range(0, most * batch, batch)]
    paths = {}
    for number, name in enumerate(samples.inputs):
        paths[name] = str(folder / f"{number}.npy")
        np.save(paths[name], np.stack([one.inputs[name] for one in chosen]), allow_pickle=False)
    return paths, len(chosen)


def _work(request: Mapping[str, Any], folder: Path, tell: Callable[[int, int], None]) -> None:
    """Let a worker do it.

    Raises:
        QuantisationFailed: it says why not, ends early, or takes longer than LONGEST_SECONDS.
    """
    (folder / "request").write_text(json.dumps(request) + "\n", encoding="utf8")
    with (folder / "request").open() as asked, (folder / "stderr").open("w+") as words:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=asked, stdout=subprocess.PIPE, stderr=words, text=True,
            cwd=folder,  # where ONNX Runtime's shape inference leaves what it didn't finish
        )  # fmt: skip
        limit = threading.Timer(LONGEST_SECONDS, process.kill)
        limit.start()
        try:
            answer = _last_answer(process, tell)
            code = process.wait()
            late = not limit.is_alive()
        finally:
            limit.cancel()
            process.kill()
            process.wait()
    if late:
        raise QuantisationFailed(f"it took longer than {LONGEST_SECONDS} s: stopped")
    if answer is None:
        last = (folder / "stderr").read_text(errors="replace").strip().splitlines()[-1:]
        raise QuantisationFailed(one_line(": ".join([f"its process ended with code {code}", *last])))
    if "error" in answer:
        raise QuantisationFailed(one_line(answer["error"]))


def _last_answer(process: subprocess.Popen[str], tell: Callable[[int, int], None]) -> dict[str, Any] | None:
    """What the worker ends with; None where it ends without a word."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answer = json.loads(line)
            if "read" not in answer:
                return answer
            tell(answer["read"], answer["of"])
    return None

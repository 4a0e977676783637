"""ONNX Runtime in a process of its own, because a graph can make it abort: a script that imports nothing of ours.

Requests come as JSON, one a line, on stdin; each is answered by a line on stdout, {"error": reason} if it failed, and
{"unwritten": reason} if there is no room for its outputs:

    {"model": path, "optimise": false}                              -> {}
    {"inputs": {name: path}, "outputs": folder, "seconds": limit}   -> {"dtypes": [...]} or {"late": true}

The second runs the model of the first. Arrays travel as .npy files, of which none is ever unpickled; an input may be in
another file too, {"path", "offset", "dtype", "shape"}. The process ends when stdin is closed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

# The files beside this one have names of libraries.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, which would write into the user's cache

import onnxruntime as ort

PLAIN_KINDS = "biufcU"  # other element types (bfloat16, ...) are written as float32, which holds them exactly


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    session = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "model" in request:
                session = None  # before the next one takes its memory
                session = _load(request)
                answer = {}
            else:
                answer = _run(session, request)
        except OSError as exc:  # of NumPy, which writes outputs; ONNX Runtime raises none
            answer = {"unwritten": str(exc)}
        except Exception as exc:  # ONNX Runtime's errors have no common base
            answer = {"error": str(exc)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(request: dict[str, Any]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # it would keep what a large run took, and more
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if request["optimise"] else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, request: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: _mapped(place) for name, place in request["inputs"].items()}
    options, late = ort.RunOptions(), threading.Event()

    def stop() -> None:
        late.set()
        options.terminate = True

    timer = threading.Timer(request["seconds"], stop)
    timer.start()
    try:
        values = session.run(None, inputs, options)
    except Exception:
        if late.is_set():
            return {"late": True}
        raise
    finally:
        timer.cancel()
    dtypes = []
    for number, value in enumerate(values):
        if not isinstance(value, np.ndarray | np.generic):
            raise TypeError(f"output {number} is no tensor, but {type(value).__name__}")
        array = np.asarray(value, dtype=str) if value.dtype == object else np.asarray(value)
        dtypes.append(array.dtype.name if array.dtype.kind != "U" else "str")
        plain = array if array.dtype.kind in PLAIN_KINDS else array.astype(np.float32)
        np.save(Path(request["outputs"]) / f"{number}.npy", plain, allow_pickle=False)
    return {"dtypes": dtypes}


def _mapped(place: str | dict[str, Any]) -> np.ndarray:
    if isinstance(place, str):
        return np.load(place, mmap_mode="r")
    return np.memmap(place["path"], place["dtype"], "r", place["offset"], tuple(place["shape"]))


if __name__ == "__main__":
    main()

"""A quantiser in a process of its own: these tools print, keep what they took, and may not survive a graph.

The request comes as JSON on stdin:

    {"tool": module, "model": path, "inputs": {name: path}, "out": path, "seconds": limit}

`inputs` are .npy files of (batches, shape of a batch), of which none is unpickled. What is printed on stdout are JSON
lines: {"read": batches, "of": batches} while it calibrates, and at last {} or {"error": reason}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

import numpy as np
import onnx

OLDEST_OPSET = 13  # from which on scales may be those of channels
FEWEST = 16  # batches, however long they take
MULTIPLIES = ("MatMul", "Einsum")


class Batches:
    """Calibration batches, as often as they are asked for; the first pass ends early where it takes too long."""

    def __init__(self, arrays: Mapping[str, np.ndarray], seconds: float, tell: Callable[[int, int], None]) -> None:
        self._arrays, self._tell = arrays, tell
        self._count = len(next(iter(arrays.values())))
        self._end = time.monotonic() + seconds

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for number in range(self._count):
            if number >= FEWEST and time.monotonic() > self._end:
                return
            self._tell(number, self._count)
            yield {name: np.array(array[number]) for name, array in self._arrays.items()}


def is_transformer(graph: onnx.GraphProto) -> bool:
    """Whether two results are multiplied with each other and go through a softmax, as queries and keys do."""
    stored = {tensor.name for tensor in graph.initializer}
    stored |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    multiplies = any(node.op_type in MULTIPLIES and not stored & set(node.input) for node in graph.node)
    kinds = {node.op_type for node in graph.node}
    return "Attention" in kinds or (multiplies and "Softmax" in kinds)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    try:
        arrays = {name: np.load(path, mmap_mode="r") for name, path in request["inputs"].items()}
        batches = Batches(arrays, request["seconds"], lambda read, of: say({"read": read, "of": of}))
        model = onnx.load(request["model"])
        if any(one.domain in ("", "ai.onnx") and one.version < OLDEST_OPSET for one in model.opset_import):
            model = onnx.version_converter.convert_version(model, OLDEST_OPSET)
            onnx.save(model, request["model"])
        tool = importlib.import_module(f"onnx_spdy.pipeline.quantised.{request['tool']}")
        tool.quantise(
            Path(request["model"]), Path(request["out"]), batches, is_transformer=is_transformer(model.graph)
        )  # fmt: skip
        say({})
    except Exception as exc:  # the tools raise errors of all kinds
        say({"error": f"{type(exc).__name__}: {exc}"})


if __name__ == "__main__":
    main()

"""Opening runtimes: those that run networks in PyTorch are told here what reads ONNX for them."""

from __future__ import annotations

from typing import Any

from onnx_spdy.runtimes import IN_PYTORCH, PREFIX, Runtime
from onnx_spdy.runtimes import open_runtime as open_by_name

# By name, so that the address of another machine can carry it there; `runtimes` itself knows nothing of `models`.
READER = "onnx_spdy.models:TorchGraph"


def open_runtime(spec: str, **options: Any) -> Runtime:
    """`onnx_spdy.runtimes.open_runtime`; networks that run in PyTorch are read by `TorchGraph`."""
    name = spec.rpartition("/")[2] if spec.startswith(PREFIX) else spec
    if name.partition(":")[0] in IN_PYTORCH:
        options.setdefault("reader", READER)
    return open_by_name(spec, **options)

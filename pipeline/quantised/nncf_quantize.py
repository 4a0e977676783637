"""NNCF's quantisation after training, made for OpenVINO: QDQ, biases corrected, SmoothQuant in transformers.

Of the ONNX file itself: the graph that it makes of one that OpenVINO has read is no faster there, and another format.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from onnx_spdy.pipeline.quantised.worker import Batches


def quantise(model: Path, out: Path, batches: Batches, *, is_transformer: bool) -> None:
    """Write the int8 network to `out`."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would report usage when it is imported
    import nncf

    nncf.set_log_level(logging.ERROR)
    quantised = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(batches),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
    )
    onnx.save(quantised, out)

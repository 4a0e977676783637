"""ONNX Runtime's static quantisation: QDQ, weights per output channel, ranges from the calibration batches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_spdy.pipeline.quantised.worker import Batches


def quantise(model: Path, out: Path, batches: Batches, *, is_transformer: bool) -> None:
    """Write the int8 network to `out`.

    Activations are uint8, as ONNX Runtime advises for x86. In transformers only multiplications by a constant are
    quantised.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rest = iter(batches)

        def get_next(self):
            return next(self._rest, None)

    logging.getLogger().setLevel(logging.ERROR)
    prepared = out.with_name("prepared.onnx")
    try:
        quant_pre_process(str(model), str(prepared))
    except Exception:  # symbolic shapes come from a script that doesn't know every operator
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(out), Reader(), per_channel=True, activation_type=QuantType.QUInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"] if is_transformer else None,
        extra_options={"MatMulConstBOnly": is_transformer},
    )  # fmt: skip

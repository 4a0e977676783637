"""Forms: how an engine wants a network in int8, so that its integer kernels run.

A form is data, not code: what it says, `place.py` and `write.py` do. To add an engine's: one more value in `FORMS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from onnx_spdy.runtimes.errors import OnnxSpdyError


class NoForm(OnnxSpdyError, ValueError):
    """A runtime that runs no networks in int8."""


@dataclass(frozen=True)
class Form:
    """What an engine fuses.

    Attributes:
        name: of the runtime.
        unsigned: whether activations may be uint8.
        lopsided: how many times as far a range reaches to one side of 0 as to the other, from which on it gets a zero
            point of its own: that costs some engines time, and a range that is cut in half costs accuracy.
        per_channel: whether the inputs of a depthwise convolution have a scale for each channel.
        outputs: whether a layer's output has to be quantised for the layer to be.
        between: operators that compute in int8 between layers, where their result is quantised anyway.
        products: whether products of two computed matrices, as those of queries and keys, are in int8; not of what a
            softmax makes, of which 8 bits leave too little.
        int32_bias: whether biases are stored in the products' own scale.
    """

    name: str
    unsigned: bool
    lopsided: float
    per_channel: bool
    outputs: bool
    between: frozenset[str]
    products: bool
    int32_bias: bool


BETWEEN = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool"})

# ONNX Runtime: its page on quantisation advises uint8 for activations on x86, and fuses a layer between
# DequantizeLinear and QuantizeLinear only. OpenVINO: as NNCF writes it for it. TensorRT: "explicit quantisation" takes
# symmetric int8 only. The test double takes anything.
OPENVINO = Form(
    "openvino",
    unsigned=True,
    lopsided=2.0,
    per_channel=True,
    outputs=False,
    between=BETWEEN,
    products=True,
    int32_bias=False,
)
FORMS = {
    form.name: form
    for form in (
        Form(
            "onnxruntime",
            unsigned=True,
            lopsided=1.0,
            per_channel=False,
            outputs=True,
            between=BETWEEN | {"Mul", "Sigmoid"},
            products=False,
            int32_bias=True,
        ),
        OPENVINO,
        replace(OPENVINO, name="tensorrt", unsigned=False, lopsided=math.inf, per_channel=False),
        replace(OPENVINO, name="fake"),
    )
}


def form_for(runtime: str) -> Form:
    """How a runtime wants a network in int8.

    Raises:
        NoForm: that isn't known.
    """
    if runtime not in FORMS:
        raise NoForm(f"{runtime} can't be given networks in int8; take one of {', '.join(sorted(FORMS))}")
    return FORMS[runtime]

"""Layers of given widths with correlated inputs: what a database costs against a layer's size, without a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.pipeline.data import Samples

POSITIONS = 8  # of each sample, so that a thousand samples give full rank to layers up to 8,192 wide
SHARED = 16  # hidden values that a layer's inputs have in common


def synthetic_layers(widths: Sequence[int], rows: int, samples: int, seed: int = 0) -> tuple[onnx.ModelProto, Samples]:
    """A network of one MatMul (width, rows) for each width, side by side, and samples for it.

    Args:
        widths: inputs of each layer.
        rows: outputs of each layer.
        samples: how many, of `POSITIONS` input vectors each.
        seed: of weights and samples.
    """
    rng = np.random.default_rng(seed)
    inputs, nodes, weights, outputs, arrays = [], [], [], [], {}
    for width in widths:
        name = f"wide{width}"
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", POSITIONS, width]))
        outputs.append(helper.make_tensor_value_info(f"{name}.output", TensorProto.FLOAT, ["batch", POSITIONS, rows]))
        nodes.append(helper.make_node("MatMul", [name, f"{name}.weight"], [f"{name}.output"], name))
        weight = rng.normal(0, width**-0.5, (width, rows)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        hidden = rng.normal(size=(samples * POSITIONS, SHARED)).astype(np.float32)
        mixed = hidden @ rng.normal(0, SHARED**-0.5, (SHARED, width)).astype(np.float32)
        own = rng.standard_normal(mixed.shape, np.float32)
        arrays[name] = np.maximum(mixed + own, 0).reshape(samples, POSITIONS, width)
    graph = helper.make_graph(nodes, "synthetic", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), Samples(arrays)

"""A runtime whose times are a formula of the non-zeros: a test double with the shape of a sparse engine.

For a Conv, Gemm or MatMul with a constant weight, M multiply-accumulates in a run and sparsity s:

    seconds = layer_overhead_seconds + seconds_per_mac * M * min(1, (1 - s) / (1 - break_even))

that is a dense kernel up to the break-even sparsity, and above it a sparse one, which is slower for each non-zero
and skips the zeros. Every other node costs `node_seconds`. The numbers come from ONNX Runtime.

A layer whose weight is stored in int8, behind a DequantizeLinear, takes INT8_SHARE of the seconds for its
multiply-accumulates. That node itself takes nothing, as an engine folds it into the layer.

With `kernels="2:4"` it has the shape of a GPU instead: a layer whose weights are 2:4, and whose channels are multiples
of CHANNELS, may run in a kernel with half the multiply-accumulates, which takes `sparse_overhead_seconds` more. Where
that isn't faster it keeps the dense one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from . import host
from .base import FORMULA, Arrays, Closing, Environment, LayerTime, ModelRefused, dense_kernel, one_line
from .model_file import LAYER_OPS, FixedModel, check_inputs, fix_model
from .nvidia.semi_structured import PATTERN, has_pattern, layer_weight, not_eligible
from .ort import create_session, run_session, session_options
from .workload import Workload

VERSION = "1"
KERNELS = ("unstructured", PATTERN)
CHANNELS = 16
INT8_SHARE = 1 / 3  # about what engines gain by int8 on CPUs that have instructions for it


@dataclass
class FakeRuntime(Closing):
    """Deterministic seconds without a clock, for tests and dry runs; threads make no difference."""

    layer_overhead_seconds: float = 20e-6
    seconds_per_mac: float = 10e-12
    node_seconds: float = 1e-6
    break_even: float = 0.4  # sparsity in [0, 1)
    noise: float = 0.0  # standard deviation of the log of a random factor on every time
    seed: int = 0  # of that noise
    kernels: str = "unstructured"  # or "2:4"
    sparse_overhead_seconds: float = 0.0  # of a 2:4 kernel
    _random: np.random.Generator = field(init=False, repr=False)

    name = "fake"
    usage = ""

    def __post_init__(self) -> None:
        if not 0 <= self.break_even < 1:
            raise ValueError(f"break_even {self.break_even} is not a sparsity in [0, 1)")
        if self.kernels not in KERNELS:
            raise ValueError(f"fake has no kernels for {self.kernels!r}; there are {', '.join(KERNELS)}")
        self._random = np.random.default_rng(self.seed)

    @property
    def patterns(self) -> frozenset[str]:
        """See `Runtime.patterns`."""
        return frozenset({self.kernels})

    def check(self) -> str:
        """The version of the formula; it works everywhere."""
        return VERSION

    def open(
        self,
        model: Path,
        workload: Workload,
        *,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> FakeSession:
        """See `Runtime.open`."""
        fixed = fix_model(Path(model), workload, zeros, seed)
        environment = Environment(
            runtime=self.name,
            version=VERSION,
            precision=FORMULA,
            cpu=FORMULA,
            instruction_set=FORMULA,
            cores=host.physical_cores(),
            threads=workload.threads_or_cores,
            batch=workload.batch,
            host=host.host_name(),
            options=tuple(sorted((one.name, repr(getattr(self, one.name))) for one in fields(FakeRuntime) if one.init)),
        )
        total = sum(row.seconds for row in self._rows(fixed))
        return FakeSession(environment, fixed, total, self.noise, self._random)

    def layer_seconds(
        self,
        model: Path,
        workload: Workload,
        *,
        iterations: int,
        warmup: int,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
        merged: bool = True,
    ) -> list[LayerTime]:
        """See `Runtime.layer_seconds`: the formula's terms, each with noise of its own, whatever the iterations."""
        fixed = fix_model(Path(model), workload, zeros, seed)
        rows = self._rows(fixed)
        factors = np.exp(self.noise * self._random.standard_normal(len(rows)))
        return [replace(row, seconds=float(row.seconds * factor)) for row, factor in zip(rows, factors, strict=True)]

    def foreign_cores(self) -> float | None:
        """0: a formula doesn't mind company."""
        return 0.0

    def close(self) -> None:
        """Nothing to release."""

    def _rows(self, fixed: FixedModel) -> list[LayerTime]:
        try:
            shaped = shape_inference.infer_shapes(fixed.to_bytes(), strict_mode=True, data_prop=True)
        except shape_inference.InferenceError as exc:
            raise ModelRefused(f"fake can't infer the model's shapes: {one_line(str(exc))}") from exc
        weights = _weights(shaped.graph)
        shapes = _shapes(shaped.graph)
        integers = {
            node.output[0]: weights[node.input[0]]
            for node in shaped.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in weights
        }
        return [
            self._row(node, weights | integers, shapes)
            for node in shaped.graph.node
            if node.op_type != "Constant" and node.output[0] not in integers
        ]

    def _row(self, node: onnx.NodeProto, weights: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> LayerTime:
        outputs = tuple(node.output)
        weight = weights.get(node.input[1]) if node.op_type in LAYER_OPS else None
        if weight is None or weight.ndim < 2:
            return LayerTime(outputs, node.op_type, self.node_seconds, sparse=False, kernel_sparsity=None)
        if not all(shapes.get(outputs[0], (0,))):
            raise ModelRefused(f"fake can't infer the shape of {outputs[0]!r}, made by {node.op_type} {node.name!r}")
        macs = _multiply_accumulates(node, weight, shapes[outputs[0]])
        sparsity = 1 - np.count_nonzero(weight) / weight.size
        if self.kernels == PATTERN:
            return self._semi_structured_row(node, weights, macs, float(sparsity))
        sparse = bool(sparsity > self.break_even)
        work = (1 - sparsity) / (1 - self.break_even) if sparse else 1.0
        work *= INT8_SHARE if weight.dtype == np.int8 else 1.0
        seconds = self.layer_overhead_seconds + self.seconds_per_mac * macs * work
        return LayerTime(outputs, "fake_sparse" if sparse else "fake_dense", float(seconds), sparse, float(sparsity))

    def _semi_structured_row(
        self, node: onnx.NodeProto, weights: dict[str, Any], macs: float, sparsity: float
    ) -> LayerTime:
        dense_seconds = self.layer_overhead_seconds + self.seconds_per_mac * macs
        sparse_seconds = dense_seconds - self.seconds_per_mac * macs / 2 + self.sparse_overhead_seconds
        weight = layer_weight(node, weights)
        kernel, seconds, sparse = "fake_dense", dense_seconds, False
        if weight is not None and has_pattern(weight):
            if reason := not_eligible(weight, CHANNELS):
                kernel = dense_kernel(kernel, reason)
            elif sparse_seconds < dense_seconds:
                kernel, seconds, sparse = "fake_2:4", sparse_seconds, True
            else:
                kernel = dense_kernel(kernel, "not picked")
        return LayerTime(tuple(node.output), kernel, seconds, sparse, sparsity)


class FakeSession(Closing):
    """One network and its formula."""

    fallback = None

    def __init__(
        self,
        environment: Environment,
        fixed: FixedModel,
        total_seconds: float,
        noise: float,
        random: np.random.Generator,
    ) -> None:
        self.environment = environment
        self._fixed = fixed
        self._total_seconds = total_seconds
        self._noise = noise
        self._random = random
        self._numbers: Any = None  # an ONNX Runtime session, made when it is needed
        self._closed = False

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        self._check_open()
        check_inputs(inputs, self._fixed.inputs)
        if self._numbers is None:
            self._numbers = create_session(self._fixed.to_bytes(), session_options(self.environment.threads))
        return dict(zip(self._fixed.outputs, run_session(self._numbers, inputs), strict=True))

    def seconds(self, iterations: int, warmup: int = 0) -> list[float]:
        """(iterations,) the formula's total, each with its own noise. Nothing is timed."""
        self._check_open()
        factors = np.exp(self._noise * self._random.standard_normal(warmup + iterations))
        return [float(self._total_seconds * factor) for factor in factors[warmup:]]

    def close(self) -> None:
        """Drop the network."""
        self._numbers, self._closed = None, True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this session is closed; open the model again")


def _weights(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Constant tensors by name: initializers and the values of Constant nodes."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values = [numpy_helper.to_array(item.t) for item in node.attribute if item.name == "value"]
            found |= dict(zip(node.output, values, strict=False))  # none where the value isn't a tensor
    return found


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that nodes make; 0 for a size that isn't known."""
    values = (*graph.value_info, *graph.output)
    return {value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim) for value in values}


def _multiply_accumulates(node: onnx.NodeProto, weight: np.ndarray, output: tuple[int, ...]) -> float:
    """Each output element takes as many as a column of the weight has elements."""
    if node.op_type == "Conv":
        column = weight[0].size  # of (out, in / groups, *kernel)
    elif node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute):
        column = weight.shape[1]  # of (out, in)
    else:
        column = weight.shape[-2]  # of (..., in, out)
    return float(np.prod(output)) * column

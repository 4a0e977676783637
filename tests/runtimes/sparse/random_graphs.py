# ruff: noqa: T201
"""Random graphs for the sparse engine, and sessions that run them there and in ONNX Runtime's own kernels.

Run as a script for more of them than the suite has: `python tests/runtimes/sparse/random_graphs.py 5000`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import onnxruntime_ep_spdy
from onnx import helper, numpy_helper

TOLERANCE = 1e-5  # relative to the largest element of the output


def session(model: onnx.ModelProto, *, sparse: bool, threads: int = 1, **options: str) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not sparse:
        return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    onnxruntime_ep_spdy.register()
    devices = [one for one in onnxruntime.get_ep_devices() if one.ep_name == onnxruntime_ep_spdy.get_ep_name()]
    settings.add_provider_for_devices(devices, {"min_sparsity": "0", **options})
    return onnxruntime.InferenceSession(model.SerializeToString(), settings)


def largest_difference(found: np.ndarray, wanted: np.ndarray, floor: float = 1e-30) -> float:
    """The largest difference, relative to the largest element; NaN and infinite elements must be the same ones.

    Args:
        floor: the least that it is relative to, for outputs of which an activation may leave next to nothing.
    """
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(found[~finite], wanted[~finite])
    assert np.isfinite(found[finite]).all()
    if not finite.any():
        return 0.0
    return float(np.abs(found[finite] - wanted[finite]).max() / max(np.abs(wanted[finite]).max(), floor))


@dataclass
class Graph:
    """A graph in the making: nodes, weights, and the value that the next node reads."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    count: itertools.count = field(default_factory=itertools.count)

    def node(self, op: str, inputs: list[str], **attributes: object) -> str:
        output = f"v{next(self.count)}"
        self.nodes.append(helper.make_node(op, inputs, [output], f"{op}_{output}", **attributes))
        return output

    def constant(self, array: np.ndarray) -> str:
        name = f"w{next(self.count)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def sparse(self, *shape: int, sparsity: float, block: int = 1) -> np.ndarray:
        """Normal weights of which that share is zero, the same along `block` neighbours of the first axis.

        Scaled so that outputs are about 1 in size: an activation that is cut at 1 would else hide large sums, whose
        rounding errors are large beside 1.
        """
        keep = self.rng.random((-(-shape[0] // block), *shape[1:])) >= sparsity
        keep = np.repeat(keep, block, axis=0)[: shape[0]]
        scale = max(1.0, float(keep.reshape(shape[0], -1).sum(1).max())) ** -0.5
        return (self.rng.normal(size=shape) * keep * scale).astype(np.float32)

    def model(self, inputs: dict[str, list[int | str]], outputs: list[str]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def activation(graph: Graph, x: str) -> str:
    kind = graph.rng.integers(9)
    if kind == 0:
        return graph.node("Relu", [x])
    if kind == 1:
        return graph.node("Clip", [x, graph.constant(np.float32(-0.5)), graph.constant(np.float32(1.5))])
    if kind == 2:
        return graph.node("LeakyRelu", [x], alpha=0.1)
    if kind == 3:
        return graph.node("HardSwish", [x])
    if kind == 4:
        return graph.node("Mul", [x, graph.node("Sigmoid", [x])])
    if kind == 5:
        error = graph.node("Erf", [graph.node("Div", [x, graph.constant(np.float32(2**0.5))])])
        product = graph.node("Mul", [x, graph.node("Add", [error, graph.constant(np.float32(1))])])
        return graph.node("Mul", [product, graph.constant(np.float32(0.5))])
    if kind == 6:
        return graph.node("Mul", [graph.node("HardSigmoid", [x], alpha=1 / 6, beta=0.5), x])
    if kind == 7:
        return graph.node("Sigmoid", [x])
    return x


def convolution(
    graph: Graph, x: str, channels: int, outputs: int, size: list[int], *, same: bool
) -> tuple[str, list[int]]:
    """One convolution that fits the size; `same` keeps it. Returns its output and that one's spatial size."""
    rng = graph.rng
    rank = len(size)
    stride = [1] * rank if same else [int(rng.choice([1, 1, 2, 3])) for _ in range(rank)]
    kernel, dilation, pads = [], [], []
    for extent in size:
        kernel.append(int(rng.choice([1, 3, 5])) if same else int(rng.integers(1, 6)))
        dilation.append(int(rng.choice([1, 1, 2, 3])))
        if same:
            pads.append([(kernel[-1] - 1) * dilation[-1] // 2] * 2)
        else:
            pads.append([int(rng.integers(0, 4)), int(rng.integers(0, 4))])
            while extent + sum(pads[-1]) < (kernel[-1] - 1) * dilation[-1] + 1:
                pads[-1][1] += 1
    attributes: dict[str, object] = {"strides": stride, "dilations": dilation, "kernel_shape": kernel}
    mode = rng.choice(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if same or mode == "NOTSET" or (mode == "VALID" and any(e < r for e, r in zip(size, reach, strict=True))):
        attributes["pads"] = [begin for begin, _ in pads] + [end for _, end in pads]
        after = [(e + sum(p) - r) // s + 1 for e, p, r, s in zip(size, pads, reach, stride, strict=True)]
    else:
        attributes["auto_pad"] = mode
        if mode == "VALID":
            after = [(e - r) // s + 1 for e, r, s in zip(size, reach, stride, strict=True)]
        else:
            attributes["dilations"] = [1] * rank  # ONNX Runtime's own SAME takes no others
            after = [-(-e // s) for e, s in zip(size, stride, strict=True)]
    groups = int(rng.choice([g for g in range(1, channels + 1) if channels % g == 0 and outputs % g == 0]))
    attributes["group"] = groups
    sparsity, block = float(rng.choice([0, 0.5, 0.8, 0.9, 1])), int(rng.choice([1, 2, 4]))
    weight = graph.sparse(outputs, channels // groups, *kernel, sparsity=sparsity, block=block)
    inputs = [x, graph.constant(weight)]
    if rng.random() < 0.5:
        inputs.append(graph.constant(rng.normal(size=outputs)))
    return graph.node("Conv", inputs, **attributes), after


def random_convolutions(rng: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    graph = Graph(rng)
    size = [int(rng.integers(1, 20)) for _ in range(int(rng.choice([1, 2])))]
    batch, channels = int(rng.integers(1, 18)), int(rng.integers(1, 13))
    x, first, outputs = "x", (batch, channels, *size), []
    for _ in range(int(rng.integers(1, 5))):
        wider = int(rng.integers(1, 18))
        if rng.random() < 0.4:  # a residual block
            y, _ = convolution(graph, x, channels, wider, size, same=True)
            y, _ = convolution(graph, activation(graph, y), wider, channels, size, same=True)
            x = activation(graph, graph.node("Add", [x, y] if rng.random() < 0.5 else [y, x]))
        else:
            x, size = convolution(graph, x, channels, wider, size, same=False)
            x, channels = activation(graph, x), wider
        if rng.random() < 0.2:
            outputs.append(x)
    if x not in outputs:
        outputs.append(x)
    dynamic = rng.random() < 0.5
    shape = ["n", first[1], *(f"s{k}" for k in range(len(first) - 2))] if dynamic else list(first)
    return graph.model({"x": shape}, outputs), {"x": rng.normal(size=first).astype(np.float32)}


def random_products(rng: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    graph = Graph(rng)
    is_gemm = rng.random() < 0.4
    leading = [int(rng.integers(1, 40)) for _ in range(1 if is_gemm else int(rng.integers(1, 4)))]
    width = int(rng.integers(1, 40))
    x, first, outputs = "x", (*leading, width), []
    for _ in range(int(rng.integers(1, 4))):
        wider = int(rng.integers(1, 40))
        is_residual = rng.random() < 0.3
        wider = width if is_residual else wider
        weight = graph.sparse(
            wider, width, sparsity=float(rng.choice([0, 0.5, 0.9, 1])), block=int(rng.choice([1, 2, 4]))
        )
        bias = graph.constant(rng.normal(size=wider if rng.random() < 0.8 else 1))
        if is_gemm:
            transposed = int(rng.integers(2))
            inputs = [x, graph.constant(weight if transposed else weight.T), bias]
            y = graph.node("Gemm", inputs, transB=transposed, alpha=0.5, beta=2.0)
        else:
            y = graph.node("MatMul", [x, graph.constant(weight.T)])
            y = graph.node("Add", [bias, y] if rng.random() < 0.5 else [y, bias])
        if is_residual:
            y = graph.node("Add", [x, y])
        x, width = activation(graph, y), wider
        if rng.random() < 0.2:
            outputs.append(x)
    if x not in outputs:
        outputs.append(x)
    shape = [f"d{k}" for k in range(len(leading))] + [first[-1]] if rng.random() < 0.5 else list(first)
    return graph.model({"x": shape}, outputs), {"x": rng.normal(size=first).astype(np.float32)}


def random_graph(seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return (random_products if seed % 3 == 2 else random_convolutions)(rng)


def instruction_sets() -> list[str]:
    """Those that run on this machine."""
    model, _ = random_graph(0)
    found = []
    for isa in ("avx512", "avx2", "neon", "plain"):
        try:
            session(model, sparse=True, isa=isa)
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
            if "doesn't run on this machine" not in str(error):
                raise
            continue
        found.append(isa)
    assert "plain" in found
    return found


def compare(seed: int, isas: list[str]) -> float:
    """The largest difference between the engine, with each instruction set, and ONNX Runtime's own kernels."""
    model, inputs = random_graph(seed)
    wanted = session(model, sparse=False).run(None, inputs)
    worst = 0.0
    for isa in isas:
        found = session(model, sparse=True, isa=isa).run(None, inputs)
        for one, other in zip(found, wanted, strict=True):
            worst = max(worst, largest_difference(one, other, floor=0.1))  # layers' outputs are about 1
    return worst


if __name__ == "__main__":
    import sys

    first, count = (int(sys.argv[2]) if len(sys.argv) > 2 else 0), int(sys.argv[1])
    sets = instruction_sets()
    differences = {}
    for number in range(first, first + count):
        try:
            differences[number] = compare(number, sets)
        except Exception as error:
            print("seed", number, type(error).__name__, str(error)[:300])
            differences[number] = float("inf")
    bad = [number for number, difference in differences.items() if difference > TOLERANCE]
    print(
        f"{count} graphs with {', '.join(sets)}: largest difference {max(differences.values()):.2g}, "
        f"{len(bad)} above {TOLERANCE}: {bad[:20]}"
    )
    sys.exit(bool(bad))

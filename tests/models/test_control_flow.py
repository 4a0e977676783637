"""If, Loop and Scan in PyTorch as in ONNX Runtime, with values from outside; what of them is found as layers."""

from __future__ import annotations

import io
import sys
import warnings

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from onnx_spdy.models import TorchGraph, UnsupportedOperator, find_layers, prepare
from onnx_spdy.models import graph as graph_module
from onnx_spdy.tools.fuzz.graphs import examples

WEIGHT = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32) / 4


def model(inputs: str, outputs: str, nodes: str, tensors: str = "") -> onnx.ModelProto:
    """A model with a weight `w` (16, 16)."""
    text = f'<ir_version: 9, opset_import: ["" : 18]> g ({inputs}) => ({outputs}) <{tensors}> {{ {nodes} }}'
    parsed = onnx.parser.parse_model(text)
    parsed.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    onnx.checker.check_model(parsed)
    return parsed


def same_as_onnx_runtime(graph: onnx.ModelProto, **inputs) -> None:
    expected = ort.InferenceSession(graph.SerializeToString()).run(None, inputs)
    found = TorchGraph(graph)({name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()})
    for (name, value), wanted in zip(found.items(), expected, strict=True):
        assert value.shape == wanted.shape, name
        np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def x(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


IF = model(
    "float[2, 16] x, bool flag, bool other",
    "float[2, 16] y, float[2, 16] z",
    """
    a = Relu (x)
    y, z = If (flag) <
        then_branch = yes () => (float[2, 16] p, float[2, 16] q) {
            p = MatMul (a, w)
            q = If (other) <
                then_branch = deep () => (float[2, 16] r) { r = Add (p, a) },
                else_branch = flat () => (float[2, 16] s) { s = Neg (x) }>
        },
        else_branch = no () => (float[2, 16] t, float[2, 16] u) {
            t = Identity (a)
            three = Constant <value = float {3}> ()
            u = Mul (a, three)
        }>
    """,
)
LOOP = model(
    "float[2, 16] x, int64 limit, float[1] bound",
    "float[2, 16] y, float[steps, 2, 16] all, int64[steps] numbers",
    """
    y, all, numbers = Loop (limit, on, x) <body = step (int64 i, bool go, float[2, 16] s) =>
        (bool more, float[2, 16] t, float[2, 16] copy, int64 j) {
            m = MatMul (s, w)
            t = Tanh (m)
            size = ReduceL2 <keepdims = 0> (t)
            one = Squeeze (bound)
            more = Greater (size, one)
            copy = Identity (t)
            j = Identity (i)
        }>
    """,
    "bool on = {1}",
)
SCAN = model(
    "float[2, 5, 16] x, float[2, 16] h",
    "float[2, 16] last, float[2, 5, 16] all, float[5, 2] sums",
    """
    last, all, sums = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1],
        scan_output_axes = [1, 0], scan_output_directions = [1, 0],
        body = step (float[2, 16] s, float[2, 16] e) => (float[2, 16] t, float[2, 16] u, float[2] v) {
            m = MatMul (s, w)
            t = Add (m, e)
            u = Sigmoid (t)
            v = ReduceSum <keepdims = 0> (u, axis)
        }> (h, x)
    """,
    "int64[1] axis = {1}",
)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_if(flag, other):
    same_as_onnx_runtime(IF, x=x(2, 16), flag=np.array(flag), other=np.array(other))


@pytest.mark.parametrize(("limit", "bound"), [(4, 0.0), (1, 0.0), (0, 0.0), (50, 0.5)])
def test_loop(limit, bound):
    """As often as it may, not at all, and until its condition ends it."""
    same_as_onnx_runtime(LOOP, x=x(2, 16), limit=np.array(limit), bound=np.array([bound], np.float32))


def test_scan_backwards():
    same_as_onnx_runtime(SCAN, x=x(2, 5, 16), h=x(2, 16))


@pytest.mark.parametrize("number", range(len(examples())))
def test_networks_with_a_bit_of_everything(number):
    """Attention, recurrence, quantised numbers, control flow, functions, half precision: prepared, as in the engine."""
    graph = prepare(examples()[number]).proto
    if number == 3:
        assert sum(node.op_type == "If" for node in graph.graph.node) == 1  # the one with a constant condition is gone
    inputs = {"x": x(2, *(dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim[1:]))}
    if len(graph.graph.input) > 1:
        inputs["flag"] = np.array(True)
    expected = ort.InferenceSession(graph.SerializeToString()).run(None, inputs)
    found = TorchGraph(graph)({name: torch.from_numpy(array) for name, array in inputs.items()})
    for value, wanted in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(value.detach().numpy(), wanted, atol=2e-2 * np.abs(wanted).max(initial=1e-3))


def test_gradients_reach_the_weight_inside_a_loop():
    graph = TorchGraph(LOOP)
    outputs = graph({"x": torch.from_numpy(x(2, 16)), "limit": torch.tensor(3), "bound": torch.zeros(1)})
    outputs["y"].sum().backward()
    assert dict(graph.named_parameters())["w"].grad.abs().sum() > 0


def test_an_unknown_operator_inside_is_named_with_those_outside():
    changed = onnx.ModelProto()
    changed.CopyFrom(LOOP)
    body = changed.graph.node[0].attribute[0].g
    body.node[1].op_type, body.node[1].name = "Unheard", "inside"
    changed.graph.node.add(op_type="Other", name="outside", input=["x"], output=["o"])
    with pytest.raises(UnsupportedOperator, match=r"Other \(node 'outside'\), Unheard \(node 'inside'\)"):
        TorchGraph(changed)


def test_layers_inside_are_listed_and_left_alone():
    (layer,) = find_layers(LOOP)
    assert layer.weight == "w" and layer.skip == "inside control flow (Loop)"
    outside = model("float[2, 16] x, bool flag", "float[2, 16] y", "a = MatMul (x, w)" + """
        y = If (flag) <then_branch = yes () => (float[2, 16] p) { p = MatMul (a, w) },
                       else_branch = no () => (float[2, 16] n) { n = Neg (a) }>""")  # fmt: skip
    assert [layer.skip for layer in find_layers(outside)] == [
        "its weight 'w' is shared by 2 uses of different kinds",
        "inside control flow (If)",
    ]


class Scripted(torch.nn.Module):
    """Runs its layer until the result is small: the older exporter writes a Loop with an If."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        for i in range(int(steps)):
            x = torch.tanh(self.layer(x)) if i % 2 == 0 else x * 0.5
        return x


class Conditional(torch.nn.Module):
    """The newer exporter writes an If."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.first(x).relu(), lambda x: self.second(x), (x,))


def exported(module: torch.nn.Module, inputs: tuple, **options) -> onnx.ModelProto:
    file = None if options.get("dynamo") else io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, inputs, file, **options)
    return program.model_proto if file is None else onnx.load_from_string(file.getvalue())


def test_a_scripted_loop_of_the_older_exporter():
    inputs = (torch.from_numpy(x(2, 16)), torch.tensor(3))
    with warnings.catch_warnings():  # PyTorch would rather have it exported by the newer one
        warnings.simplefilter("ignore")
        script = torch.jit.script(Scripted().eval())
    graph = prepare(exported(script, inputs, dynamo=False, opset_version=17, input_names=["x", "steps"])).proto
    assert any(node.op_type == "Loop" for node in graph.graph.node)
    for steps in (0, 1, 4):
        found = TorchGraph(graph)({"x": inputs[0], "steps": torch.tensor(steps)})
        torch.testing.assert_close(next(iter(found.values())), script(inputs[0], torch.tensor(steps)))


def test_a_condition_of_the_newer_exporter():
    module, one = Conditional().eval(), torch.from_numpy(x(2, 16))
    graph = prepare(exported(module, (one,), dynamo=True, verbose=False)).proto
    assert any(node.op_type == "If" for node in graph.graph.node)
    for inputs in (one.abs(), -one.abs()):
        (found,) = TorchGraph(graph)({graph.graph.input[0].name: inputs}).values()
        torch.testing.assert_close(found, module(inputs))


OUTER_WEIGHTS = {
    "branches of an If": """
        g (float[batch, 16] x, bool on) => (float[batch, 16] z) WEIGHTS {
            a = MatMul (x, w1)
            c = If (on) <then_branch = t () => (float[n, 16] p) { p = MatMul (a, w2) },
                         else_branch = e () => (float[n, 16] q) { q = MatMul (a, w3) }>
            z = MatMul (c, w4)
        }""",
    "one weight in both, and outside": """
        g (float[batch, 16] x, bool on) => (float[batch, 16] z) WEIGHTS {
            a = MatMul (x, w1)
            c = If (on) <then_branch = t () => (float[n, 16] p) { p = MatMul (a, w2) },
                         else_branch = e () => (float[n, 16] q) { m = MatMul (a, w2) q = MatMul (m, w1) }>
            d = MatMul (c, w3)
            z = MatMul (d, w4)
        }""",
    "an If in an If": """
        g (float[batch, 16] x, bool on) => (float[batch, 16] z) WEIGHTS {
            c = If (on) <then_branch = t () => (float[n, 16] p) {
                            m = MatMul (x, w1)
                            p = If (on) <then_branch = tt () => (float[n, 16] r) { r = MatMul (m, w2) },
                                         else_branch = te () => (float[n, 16] s) { s = MatMul (m, w3) }>
                         },
                         else_branch = e () => (float[n, 16] q) { q = Relu (x) }>
            z = MatMul (c, w4)
        }""",
    "the body of a Loop": """
        g (float[batch, 16] x, bool on) => (float[batch, 16] z) WEIGHTS {
            a = MatMul (x, w1)
            c = Loop (three, on, a) <body = b (int64 i, bool go, float[n, 16] u) => (bool more, float[n, 16] v) {
                m = MatMul (u, w2) k = Tanh (m) v = MatMul (k, w3) more = Identity (go) }>
            z = MatMul (c, w4)
        }""",
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("case", OUTER_WEIGHTS)
def test_weights_that_only_inner_graphs_read_stay(case, large, monkeypatch):
    text = OUTER_WEIGHTS[case].replace("WEIGHTS", "<int64 three = {3}>")
    network = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal((16, 16), np.float32) / 4 for k in (1, 2, 3, 4)}
    network.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(network)
    if large:  # as over 2 GiB, where weights are set aside
        monkeypatch.setattr(graph_module, "LARGEST_PROTOBUF_BYTES", 2000)
        monkeypatch.setattr(sys.modules[prepare.__module__], "LARGEST_PROTOBUF_BYTES", 2000)
        monkeypatch.setattr(sys.modules[prepare.__module__], "UNTOUCHED_BYTES", 1000)
    prepared = prepare(network).proto
    stored = {tensor.name for tensor in graph_module.all_tensors(prepared)}
    assert stored >= {name for name in weights if f", {name})" in text}
    x = rng.standard_normal((3, 16), np.float32)
    for on in (True, False):
        inputs = {"x": x, "on": np.array(on)}
        found, expected = (
            ort.InferenceSession(one.SerializeToString()).run(None, inputs)[0] for one in (prepared, network)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert prepare(prepared).proto.SerializeToString() == prepared.SerializeToString()

"""Which tensors of small graphs are quantised, read off by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest
from onnx import helper

from onnx_spdy.models.graph import ModelError
from onnx_spdy.models.int8.flows import Clauses, find_flows
from onnx_spdy.models.int8.form import FORMS, Form
from onnx_spdy.models.int8.place import NothingToQuantise, Placement, find_placement
from tests.models.int8.writing import residual
from tests.models.narrowing import network

ORT, VINO, TRT = FORMS["onnxruntime"], FORMS["openvino"], FORMS["tensorrt"]
IMAGE = "float[n, 8, 8, 8] x"
RESIDUAL = f"""
g ({IMAGE}) => (float[n, 5] y) <float[8, 8, 3, 3] w1, float[8] b1, float[8, 8, 3, 3] w2, float[5, 8] w3, float[5] b3>
{{
    [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    [relu] r = Relu (a)
    [pool] p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    [second] c = Conv <pads = [1, 1, 1, 1]> (p, w2)
    [add] s = Add (c, p)
    [mean] m = GlobalAveragePool (s)
    [flat] f = Flatten (m)
    [last] y = Gemm <transB = 1> (f, w3, b3)
}}"""


def readers(placement: Placement) -> dict[str, set[tuple[str, int]]]:
    return {tensor: set(who) for tensor, who in placement.points.items()}


def test_a_residual_block_is_in_int8_from_the_first_layer_to_the_last() -> None:
    placement = find_placement(network(RESIDUAL), VINO)
    assert readers(placement) == {
        "x": {("first", 0)},
        "r": {("pool", 0)},  # where it is made, not behind the pool, which only picks
        "c": {("add", 0)},
        "s": {("mean", 0)},
        "m": {("flat", 0)},
    }
    assert [(one.name, one.axis, one.nodes) for one in placement.weights] == [
        ("w1", 0, ("first",)), ("w2", 0, ("second",)), ("w3", 0, ("last",)),
    ]  # fmt: skip
    assert placement.biases == {"b1": ("x", "w1"), "b3": ("m", "w3")}
    assert placement.skipped == {}
    assert placement.depthwise == frozenset()


def test_onnx_runtime_wants_every_output_of_a_layer_quantised_but_those_of_the_graph() -> None:
    model = network(f"""
    g ({IMAGE}) => (float[n, 4, 8, 8] y, float[n, 8, 8, 8] e)
    <float[8, 8, 1, 1] w1, float[4, 8, 1, 1] w2>
    {{
        [first] a = Conv (x, w1)
        [exp] e = Exp (a)
        [second] y = Conv (e, w2)
    }}""")
    assert readers(find_placement(model, VINO)) == {"x": {("first", 0)}, "e": {("second", 0)}}
    # The graph's own output e stays as it was: only the layer reads what was quantised.
    assert readers(find_placement(model, ORT)) == {"x": {("first", 0)}, "a": {("exp", 0)}, "e": {("second", 0)}}


def test_a_layer_whose_result_leaves_the_graph_keeps_it_in_floating_point() -> None:
    for form in FORMS.values():
        assert "y" not in find_placement(network(RESIDUAL), form).points


def test_inputs_of_a_depthwise_layer_have_scales_for_their_channels() -> None:
    model = network(f"""
    g ({IMAGE}) => (float[n, 4, 8, 8] y)
    <float[8, 8, 1, 1] w1, float[8, 1, 3, 3] w2, float[4, 8, 1, 1] w3>
    {{
        [expand] a = Conv (x, w1)
        [relu] r = Relu (a)
        [deep] d = Conv <group = 8, pads = [1, 1, 1, 1]> (r, w2)
        [project] y = Conv (d, w3)
    }}""")
    placement = find_placement(model, VINO)
    assert placement.depthwise == {"r"}
    assert readers(placement)["r"] == {("deep", 0)}
    # Read by another layer too, it has one scale.
    model.graph.node.append(helper.make_node("Conv", ["r", "w1"], ["z"], "more"))
    model.graph.output.append(onnx.ValueInfoProto(name="z"))
    assert find_placement(model, VINO).depthwise == frozenset()


ATTENTION = """
g (float[n, 6, 16] x) => (float[n, 6, 16] y) <float[16, 16] wq, float[16, 16] wk, float[16, 16] wv, float[16, 16] wo>
{
    [q] q = MatMul (x, wq)
    [k] k = MatMul (x, wk)
    [v] v = MatMul (x, wv)
    [turn] t = Transpose <perm = [0, 2, 1]> (k)
    [scores] s = MatMul (q, t)
    [soft] p = Softmax <axis = -1> (s)
    [mix] m = MatMul (p, v)
    [out] y = MatMul (m, wo)
}"""


def test_products_of_queries_and_keys_are_in_int8_and_what_a_softmax_makes_is_not() -> None:
    placement = find_placement(network(ATTENTION), VINO)
    assert readers(placement) == {
        "x": {("q", 0), ("k", 0), ("v", 0)},
        "q": {("scores", 0)},
        "k": {("turn", 0)},  # before it is transposed
        "m": {("out", 0)},
    }
    assert [one.axis for one in placement.weights] == [1, 1, 1, 1]
    assert "q" not in find_placement(network(ATTENTION), replace(VINO, products=False)).points


def test_a_swish_between_layers_is_in_int8_in_onnx_runtimes_form() -> None:
    model = network(f"""
    g ({IMAGE}) => (float[n, 4, 8, 8] y) <float[8, 8, 1, 1] w1, float[4, 8, 1, 1] w2>
    {{
        [first] a = Conv (x, w1)
        [sigmoid] g = Sigmoid (a)
        [mul] s = Mul (a, g)
        [second] y = Conv (s, w2)
    }}""")
    assert readers(find_placement(model, ORT)) == {
        "x": {("first", 0)}, "a": {("sigmoid", 0), ("mul", 0)}, "g": {("mul", 1)}, "s": {("second", 0)},
    }  # fmt: skip
    assert readers(find_placement(model, VINO)) == {"x": {("first", 0)}, "s": {("second", 0)}}


def test_who_computes_in_floating_point_reads_a_tensor_as_it_was() -> None:
    model = network(f"""
    g ({IMAGE}) => (float[n, 4, 4, 4] y, float[n, 8, 4, 4] z)
    <float[4, 8, 1, 1] w1, float[4, 8, 2, 2] w2>
    {{
        [pool] p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
        [one] a = Conv (p, w1)
        [two] b = Conv <strides = [2, 2]> (x, w2)
        y = Add (a, b)
        [exp] z = Exp (p)
    }}""")
    for form in (VINO, TRT):
        assert readers(find_placement(model, form)) == {"x": {("two", 0)}, "p": {("one", 0)}}


def test_what_a_graph_gives_out_is_not_made_of_quantised_values_by_moving_them() -> None:
    model = network(f"""
    g ({IMAGE}) => (float[n, 4] y, float[n, 512] f) <float[4, 512] w1, float[4, 8, 8, 8] w2>
    {{
        [flat] f = Flatten (x)
        [last] a = Gemm <transB = 1> (f, w1)
        [conv] c = Conv (x, w2)
        [squeezed] d = Flatten (c)
        y = Add (a, d)
    }}""")
    assert readers(find_placement(model, VINO)) == {"x": {("conv", 0)}, "f": {("last", 0)}}


def test_layers_can_be_named() -> None:
    model = network(RESIDUAL)
    placement = find_placement(model, VINO, {"second"})
    assert [one.name for one in placement.weights] == ["w2"]
    assert readers(placement) == {"r": {("pool", 0)}} or readers(placement) == {"p": {("second", 0)}}
    assert placement.skipped == {}
    assert "q" not in find_placement(network(ATTENTION), VINO, {"q", "k", "v", "out"}).points  # only these


REASONS = """
g (float[n, 8, 8, 8] x, float[8, 8] row, float16[n, 4] half) =>
  (float[n, 4, 16, 16] y1, float[8, 4] y2, float[8, 4] y3, float[2, 8, 4] y4, float16[n, 3] y5, float[8, 4] y6,
   float[8, 4] y7)
<float[8, 4, 2, 2] up, float[8, 4] across, float[8, 4] scaled, float[2, 8, 4] stack, float16[4, 3] halves,
 float[8, 8] stored, float[8, 4] after, float[8, 4] able>
{
    [up] y1 = ConvTranspose <strides = [2, 2]> (x, up)
    [across] y2 = Gemm <transA = 1> (row, across)
    [scaled] y3 = Gemm <alpha = 0.5> (row, scaled)
    [stack] y4 = MatMul (row, stack)
    [half] y5 = MatMul (half, halves)
    [stored] y6 = MatMul (stored, after)
    [able] y7 = MatMul (row, able)
}"""


def test_a_layer_that_stays_says_why() -> None:
    placement = find_placement(network(REASONS), VINO)
    assert [one.name for one in placement.weights] == ["able"]
    assert readers(placement) == {"row": {("able", 0)}}
    assert placement.skipped == {
        "up": "transposed convolutions stay in floating point",
        "across": "its input is transposed or scaled",
        "scaled": "its input is transposed or scaled",
        "stack": "its weight has 3 dimensions, not 2",
        "half": "its weight is FLOAT16, not float32",
        "stored": "its input is stored",
    }
    with pytest.raises(NothingToQuantise) as caught:
        find_placement(network(REASONS), VINO, {"up", "half", "no such layer"})
    assert str(caught.value) == (
        "no layer of the network can compute in int8 "
        "(up: transposed convolutions stay in floating point; half: its weight is FLOAT16, not float32)"
    )


def test_a_weight_that_others_use_stays_as_it_is() -> None:
    model = network("""
    g (float[n, 8] x, float[n, 8] z) => (float[n, 8] y1, float[n, 8] y2, float[n, 8] y3, float[8, 8] kept)
    <float[8, 8] tied, float[8, 8] kept, float[8, 8] twice>
    {
        [a] y1 = MatMul (x, tied)
        t = Transpose (tied)
        [b] y2 = MatMul (x, t)
        [c] y3 = MatMul (x, kept)
        [d] d = MatMul (x, twice)
        [e] e = MatMul (z, twice)
        [f] y4 = Add (d, e)
    }""")
    placement = find_placement(model, VINO)
    assert placement.skipped == {
        "a": "its weight is read by another kind of node too",
        "c": "its weight is an output of the graph",
    }
    assert [(one.name, one.nodes) for one in placement.weights] == [("twice", ("d", "e"))]


def test_only_a_bias_of_one_stored_value_for_each_channel_is_told() -> None:
    model = network("""
    g (float[n, 8] x, float[8] given) => (float[n, 4] y1, float[n, 8] y2, float[n, 4] y3)
    <float[8, 4] w1, float[1, 4] row, float[8, 8] w2, float[8, 4] w3, float[4] b>
    {
        [row] y1 = Gemm (x, w1, row)
        [given] y2 = Gemm (x, w2, given)
        [plain] y3 = Gemm (x, w3, b)
    }""")
    assert find_placement(model, ORT).biases == {"b": ("x", "w3")}


def test_an_old_opset_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="the graph has opset 12; int8 weights need opset 13 or later"):
        find_placement(network(RESIDUAL, opset=12), VINO)


def test_a_tensor_that_only_an_inner_graph_reads_is_no_matter() -> None:
    model = network(f"""
    g ({IMAGE}, bool c) => (float[n, 4, 8, 8] y, float[n, 8, 8, 8] z)
    <float[8, 8, 1, 1] w1, float[4, 8, 1, 1] w2>
    {{
        [first] a = Conv (x, w1)
        [choose] z = If (c) <
            then_branch = one () => (float[n, 8, 8, 8] t) {{ t = Exp (a) }},
            else_branch = two () => (float[n, 8, 8, 8] e) {{ e = Neg (a) }}>
        [second] y = Conv (x, w2)
    }}""")
    for form in FORMS.values():
        assert set(find_placement(model, form).points) == {"x"}


@pytest.mark.parametrize("blocks", [400])
def test_deep_networks_are_placed_too(blocks: int) -> None:
    """Each addition is in int8 because the one after it is."""
    steps = "\n".join(
        f"[c{i}] t{i} = Conv <pads = [1, 1, 1, 1]> (s{i}, w) s{i + 1} = Add (s{i}, t{i})" for i in range(blocks)
    )
    model = network(f"""
    g (float[n, 4, 4, 4] x) => (float[n, 4, 4, 4] y) <float[4, 4, 3, 3] w>
    {{
        [first] s0 = Conv <pads = [1, 1, 1, 1]> (x, w)
        {steps}
        [last] y = Conv <pads = [1, 1, 1, 1]> (s{blocks}, w)
    }}""")
    points = find_placement(model, VINO).points
    assert set(points) == {"x", *(f"s{i}" for i in range(blocks + 1)), *(f"t{i}" for i in range(blocks))}


def of_all(clauses: Clauses, layers: set[str]) -> bool:
    return all(clause & layers for clause in clauses)


@pytest.mark.parametrize("form", [ORT, VINO], ids=lambda form: form.name)
@pytest.mark.parametrize("make", [residual, lambda: network(RESIDUAL)], ids=["two blocks", "one block"])
def test_flows_say_for_any_choice_of_layers_what_is_in_int8(make: Callable[[], onnx.ModelProto], form: Form) -> None:
    model = make()
    flows = find_flows(model, form)
    nodes = {output: node for node in model.graph.node for output in node.output}
    layers = [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    for states in itertools.product([False, True], repeat=len(layers)):
        if not any(states):
            continue
        chosen = {name for name, state in zip(layers, states, strict=True) if state}
        placement = find_placement(model, form, chosen)
        in_int8 = {
            node.name for node in nodes.values() if node.op_type in form.between
            and node.output[0] in placement.points
            and flows[node.output[0]].made is not None and of_all(flows[node.output[0]].made, chosen)
        }  # fmt: skip
        for tensor, flow in flows.items():
            node = nodes[tensor]
            if flow.converts:
                is_read = any(of_all(clauses, chosen) for clauses in flow.read)
                own_sake = form.outputs and flow.made is not None and of_all(flow.made, chosen)
                assert (tensor in placement.points) is (is_read or own_sake), (tensor, chosen)
            if node.op_type in form.between:
                reads = {(node.name, number) for number in range(len(node.input))}
                found = {reader for readers in placement.points.values() for reader in readers}
                if not form.outputs:  # there layers hand everybody what was quantised
                    assert bool(reads & found) is (node.name in in_int8), (tensor, chosen)

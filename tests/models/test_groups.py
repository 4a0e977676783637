"""What must shrink together, rule by rule, on graphs of a few nodes.

Each graph is also narrowed at random widths and compared with the one in which the removed units count for nothing.
"""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from onnx_spdy.models import find_groups
from onnx_spdy.models.groups.labels import Factor, reshaped
from tests.models.narrowing import check, check_narrow_is_masked, groups_by_name, network

IMAGE = "float[n, 3, 8, 8] x"
TOKENS = "float[n, 6, 16] x"


def test_channels_between_two_convolutions_with_what_is_applied_to_each_channel():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[16, 3, 3, 3] w1, float[16] b1, float[16] s, float[16] m, float[16, 1, 1] slope, float[5, 16, 1, 1] w2>
    {{
        [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        [norm] b = BatchNormalization (a, s, b1, m, s)
        [slope] c = PRelu (b, slope)
        [gate] d = Sigmoid (c)
        [second] y = Conv (d, w2)
    }}""")
    group = check(model)["first"]
    assert (group.kind, group.units, group.skip) == ("inner", 16, None)
    assert (group.producers, group.consumers) == (("first",), ("second",))
    assert {(axis.initializer, axis.axis, axis.role) for axis in group.axes} == {
        ("w1", 0, "out"), ("b1", 0, "between"), ("s", 0, "between"), ("m", 0, "between"), ("slope", 0, "between"),
        ("w2", 1, "in"),
    }  # fmt: skip
    assert all(axis.indices == tuple((unit,) for unit in range(16)) for axis in group.axes)


def test_what_leaves_the_graph_keeps_its_width():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y) <float[5, 3, 1, 1] w>
    {{ [last] y = Conv (x, w) }}""")
    assert groups_by_name(model)["last"].skip == "output 'y' of the graph keeps its shape"


def test_additions_couple_widths():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[8, 3, 1, 1] w1, float[12, 8, 1, 1] w2, float[8, 12, 1, 1] w3, float[5, 8, 1, 1] w4>
    {{
        [stem] a = Conv (x, w1)
        [up] b = Conv (a, w2)
        c = Relu (b)
        [down] d = Conv (c, w3)
        e = Add (a, d)
        [last] y = Conv (e, w4)
    }}""")
    groups = check(model)
    assert groups["stem"].kind == "residual"
    assert groups["stem"].producers == ("stem", "down")
    assert groups["stem"].consumers == ("up", "last")
    assert (groups["up"].kind, groups["up"].units) == ("inner", 12)


def test_concatenated_channels_lie_behind_each_other_and_shrink_apart():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[8, 3, 1, 1] w1, float[6, 3, 1, 1] w2, float[5, 17, 1, 1] w3>
    {{
        [one] a = Conv (x, w1)
        [two] b = Conv (x, w2)
        c = Concat <axis = 1> (a, x, b)
        [last] y = Conv (c, w3)
    }}""")
    groups = check(model)
    (columns,) = (axis for axis in groups["two"].axes if axis.role == "in")
    assert columns.indices == tuple((11 + unit,) for unit in range(6))
    assert groups["one"].units == 8


def test_parts_of_a_split_shrink_apart_and_its_sizes_follow():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y, float[n, 4, 8, 8] z)
    <float[16, 3, 1, 1] w1, float[5, 10, 1, 1] w2, float[4, 6, 1, 1] w3, int64[2] sizes = {{10, 6}}>
    {{
        [stem] a = Conv (x, w1)
        [split] b, c = Split <axis = 1> (a, sizes)
        [one] y = Conv (b, w2)
        [two] z = Conv (c, w3)
    }}""")
    groups = check(model)
    assert (groups["stem"].units, groups["stem#2"].units) == (10, 6)
    narrow = check_narrow_is_masked(model, {"stem": [0, 9], "stem#2": [5]})
    stored = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in narrow.graph.initializer}
    assert stored["sizes"] == [2, 1]


def test_ranges_of_channels_move_with_those_before_them():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y, float[n, 4, 8, 8] z)
    <float[16, 3, 1, 1] w1, float[5, 6, 1, 1] w2, float[4, 5, 1, 1] w3, int64[1] four = {{4}}, int64[1] ten = {{10}},
     int64[1] last = {{-5}}, int64[1] end = {{9223372036854775807}}, int64[1] axis = {{1}}>
    {{
        [stem] a = Conv (x, w1)
        b = Slice (a, four, ten, axis)
        c = Slice (a, last, end, axis)
        [one] y = Conv (b, w2)
        [two] z = Conv (c, w3)
    }}""")
    groups = check(model, seeds=6)
    assert sorted(group.units for group in groups.values() if group.prunable) == [5, 5, 6]


def test_gate_and_value_of_a_gated_unit_shrink_together():
    model = network(f"""
    g ({TOKENS}) => (float[n, 6, 5] y)
    <float[16, 24] gate, float[16, 24] up, float[24] bias, float[24, 5] down>
    {{
        [gate] a = MatMul (x, gate)
        b = Sigmoid (a)
        c = Mul (a, b)
        [up] d = MatMul (x, up)
        e = Add (d, bias)
        f = Mul (c, e)
        [down] y = MatMul (f, down)
    }}""")
    group = check(model)["gate"]
    assert (group.kind, group.units, group.producers) == ("ffn", 24, ("gate", "up"))


def test_both_halves_of_one_gated_matrix_shrink_together():
    model = network(f"""
    g ({TOKENS}) => (float[n, 6, 5] y) <float[16, 48] both, float[24, 5] down>
    {{
        [both] a = MatMul (x, both)
        [halves] b, c = Split <axis = -1, num_outputs = 2> (a)
        d = Tanh (b)
        f = Mul (d, c)
        [down] y = MatMul (f, down)
    }}""")
    group = check(model)["both"]
    assert (group.kind, group.units) == ("ffn", 24)
    (rows,) = (axis for axis in group.axes if axis.role == "out")
    assert rows.indices == tuple((unit, 24 + unit) for unit in range(24))


ATTENTION = """
g (float[n, 6, 16] x) => (float[n, 6, 16] y)
<float[16, 32] wq, float[16, {kv}] wk, float[16, {kv}] wv, float[32, 16] wo, float[32] bq, float[{kv}] bv,
 int64[4] queries = {{0, 6, 4, 8}}, int64[4] keys = {{0, 6, {heads}, 8}}, int64[3] flat = {{0, 6, 32}},
 int64[1] two = {{2}}, int64[5] many = {{1, {heads}, {repeat}, 1, 1}}, int64[4] joined = {{0, 4, 6, 8}},
 float scale = {{0.3}}>
{{
    [q] q = MatMul (x, wq)
    q1 = Add (q, bq)
    q2 = Reshape (q1, queries)
    q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
    [k] k = MatMul (x, wk)
    k2 = Reshape (k, keys)
    k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
    k4 = Unsqueeze (k3, two)
    k5 = Expand (k4, many)
    k6 = Reshape (k5, joined)
    k7 = Transpose <perm = [0, 1, 3, 2]> (k6)
    [v] v = MatMul (x, wv)
    v1 = Add (v, bv)
    v2 = Reshape (v1, keys)
    v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
    v4 = Unsqueeze (v3, two)
    v5 = Expand (v4, many)
    v6 = Reshape (v5, joined)
    [scores] s = MatMul (q3, k7)
    s1 = Mul (s, scale)
    s2 = Softmax <axis = -1> (s1)
    [mix] a = MatMul (s2, v6)
    a1 = Transpose <perm = [0, 2, 1, 3]> (a)
    a2 = Reshape (a1, flat)
    [o] y = MatMul (a2, wo)
}}"""


def test_a_head_is_its_queries_keys_values_and_columns_of_the_projection():
    group = check(network(ATTENTION.format(kv=32, heads=4, repeat=1)))["q"]
    assert (group.kind, group.units, group.producers, group.consumers) == ("heads", 4, ("q", "k", "v"), ("o",))
    by_name = {axis.initializer: axis for axis in group.axes}
    assert set(by_name) == {"wq", "wk", "wv", "wo", "bq", "bv"}
    assert all(axis.indices[2] == tuple(range(16, 24)) for axis in group.axes)


def test_a_shared_key_and_value_head_goes_with_all_its_queries():
    group = check(network(ATTENTION.format(kv=16, heads=2, repeat=2)))["q"]
    assert (group.kind, group.units) == ("heads", 2)
    by_name = {axis.initializer: axis.indices[1] for axis in group.axes}
    assert by_name["wq"] == by_name["wo"] == tuple(range(16, 32))
    assert by_name["wk"] == by_name["wv"] == tuple(range(8, 16))


def test_heads_of_one_matrix_for_queries_keys_and_values():
    model = network(f"""
    g ({TOKENS}) => (float[n, 6, 16] y)
    <float[16, 96] w, float[32, 16] wo, int64[5] shape = {{0, 6, 3, 4, 8}}, int64[3] flat = {{0, 6, 32}},
     int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}>
    {{
        [qkv] a = MatMul (x, w)
        b = Reshape (a, shape)
        c = Transpose <perm = [2, 0, 3, 1, 4]> (b)
        q = Gather <axis = 0> (c, zero)
        k = Gather <axis = 0> (c, one)
        v = Gather <axis = 0> (c, two)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        p = Softmax <axis = -1> (s)
        o = MatMul (p, v)
        o1 = Transpose <perm = [0, 2, 1, 3]> (o)
        o2 = Reshape (o1, flat)
        [out] y = MatMul (o2, wo)
    }}""")
    group = check(model)["qkv"]
    assert (group.kind, group.units) == ("heads", 4)
    (rows,) = (axis for axis in group.axes if axis.role == "out")
    assert rows.indices[1] == (*range(8, 16), *range(40, 48), *range(72, 80))


def test_rotated_positions_keep_a_head_whole():
    model = network(f"""
    g ({TOKENS}) => (float[n, 6, 16] y)
    <float[16, 32] wq, float[16, 32] wk, float[16, 32] wv, float[32, 16] wo, float[6, 8] cos, float[6, 8] sin,
     int64[4] shape = {{0, 6, 4, 8}}, int64[3] flat = {{0, 6, 32}}, int64[2] halves = {{4, 4}}>
    {{
        q = MatMul (x, wq)
        q1 = Reshape (q, shape)
        q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
        qa, qb = Split <axis = -1> (q2, halves)
        qc = Neg (qb)
        qd = Concat <axis = -1> (qc, qa)
        qe = Mul (q2, cos)
        qf = Mul (qd, sin)
        qg = Add (qe, qf)
        k = MatMul (x, wk)
        k1 = Reshape (k, shape)
        k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
        v = MatMul (x, wv)
        v1 = Reshape (v, shape)
        v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
        s = MatMul (qg, k2)
        p = Softmax <axis = -1> (s)
        o = MatMul (p, v2)
        o1 = Transpose <perm = [0, 2, 1, 3]> (o)
        o2 = Reshape (o1, flat)
        [out] y = MatMul (o2, wo)
    }}""")
    groups = check(model)
    (group,) = (group for group in groups.values() if group.prunable)
    assert (group.kind, group.units) == ("heads", 4)
    assert not {"cos", "sin"} & {axis.initializer for axis in group.axes}


def test_one_head_alone_cannot_go_because_its_width_is_summed_over():
    model = network(f"""
    g ({TOKENS}) => (float[n, 6, 6] y) <float[16, 8] wq, float[16, 8] wk>
    {{
        [q] q = MatMul (x, wq)
        [k] k = MatMul (x, wk)
        k1 = Transpose <perm = [0, 2, 1]> (k)
        [scores] y = MatMul (q, k1)
    }}""")
    groups = groups_by_name(model)
    assert "MatMul 'scores', a product of two activations, sums over it" in (groups["q"].skip or "")


def test_a_depthwise_convolution_goes_along():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[16, 3, 1, 1] w1, float[32, 1, 3, 3] w2, float[32] b2, float[5, 32, 1, 1] w3>
    {{
        [up] a = Conv (x, w1)
        [depthwise] b = Conv <group = 16, pads = [1, 1, 1, 1]> (a, w2, b2)
        c = Clip (b)
        [down] y = Conv (c, w3)
    }}""")
    group = check(model)["up"]
    assert (group.units, group.producers, group.consumers) == (16, ("up",), ("down",))
    assert {axis.initializer: axis.indices[3] for axis in group.axes} == {
        "w1": (3,), "w2": (6, 7), "b2": (6, 7), "w3": (6, 7)
    }  # fmt: skip
    narrow = check_narrow_is_masked(model, {"up": [1, 4, 7]})
    (depthwise,) = (node for node in narrow.graph.node if node.name == "depthwise")
    assert next(one.i for one in depthwise.attribute if one.name == "group") == 3


def test_units_of_a_grouped_convolution_are_its_groups():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[12, 3, 1, 1] w1, float[8, 3, 1, 1] w2, float[5, 8, 1, 1] w3>
    {{
        [first] a = Conv (x, w1)
        [grouped] b = Conv <group = 4> (a, w2)
        [last] y = Conv (b, w3)
    }}""")
    group = check(model)["first"]
    assert group.units == 4
    assert {axis.initializer: axis.indices[1] for axis in group.axes} == {"w1": (3, 4, 5), "w2": (2, 3), "w3": (2, 3)}


def test_transposed_convolutions_take_in_and_make_channels():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 16, 16] y)
    <float[12, 3, 1, 1] w1, float[12, 6, 2, 2] w2, float[6] b2, float[6, 2, 1, 1] w3, float[5, 12, 1, 1] w4>
    {{
        [first] a = Conv (x, w1)
        [up] b = ConvTranspose <strides = [2, 2]> (a, w2, b2)
        [grouped] c = ConvTranspose <group = 6> (b, w3)
        [last] y = Conv (c, w4)
    }}""")
    groups = check(model)
    assert (groups["first"].units, groups["up"].units) == (12, 6)


@pytest.mark.parametrize(
    "flatten", ["Flatten (b)", "Reshape (b, shape)", "Reshape (b, open)"], ids=["flatten", "reshape", "open"]
)
def test_a_flattened_channel_is_all_its_positions(flatten):
    model = network(f"""
    g ({IMAGE}) => (float[n, 5] y)
    <float[6, 3, 1, 1] w1, float[5, 96] w2, int64[2] shape = {{-1, 96}}, int64[2] open = {{0, -1}}>
    {{
        [conv] a = Conv (x, w1)
        b = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
        c = {flatten}
        [fc] y = Gemm <transB = 1> (c, w2)
    }}""")
    group = check(model)["conv"]
    (columns,) = (axis for axis in group.axes if axis.role == "in")
    assert columns.indices[2] == tuple(range(32, 48))


def test_a_channel_of_a_reshaped_vector_is_all_its_positions():
    model = network("""
    g (float[n, 8] x) => (float[n, 3, 4, 4] y)
    <float[96, 8] w1, float[3, 6, 1, 1] w2, int64[4] shape = {-1, 6, 4, 4}>
    {
        [fc] a = Gemm <transB = 1> (x, w1)
        b = Reshape (a, shape)
        [conv] y = Conv (b, w2)
    }""")
    group = check(model)["fc"]
    assert (group.kind, group.units, group.axes[0].indices[1]) == ("inner", 6, tuple(range(16, 32)))


def test_shuffled_channels_go_in_pairs():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[12, 3, 1, 1] w1, float[5, 12, 1, 1] w2, int64[5] apart = {{0, 2, 6, 8, 8}}, int64[4] back = {{0, 12, 8, 8}}>
    {{
        [first] a = Conv (x, w1)
        b = Reshape (a, apart)
        c = Transpose <perm = [0, 2, 1, 3, 4]> (b)
        d = Reshape (c, back)
        [last] y = Conv (d, w2)
    }}""")
    group = check(model)["first"]
    assert group.units == 6
    assert {axis.initializer: axis.indices[2] for axis in group.axes} == {"w1": (2, 8), "w2": (4, 5)}


def test_a_block_of_channels_becomes_one_by_depth_to_space():
    for mode in ("CRD", "DCR"):
        model = network(f"""
        g ({IMAGE}) => (float[n, 5, 16, 16] y) <float[12, 3, 1, 1] w1, float[5, 3, 1, 1] w2>
        {{
            [first] a = Conv (x, w1)
            b = DepthToSpace <blocksize = 2, mode = "{mode}"> (a)
            [last] y = Conv (b, w2)
        }}""")
        assert check(model)["first"].units == 3


def test_means_over_space_squeezing_and_scales_for_each_channel():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y, float[n, 4] z)
    <float[8, 3, 1, 1] w1, float[3, 8, 1, 1] w2, float[8, 3, 1, 1] w3, float[8] b3, float[5, 8, 1, 1] w4,
     float[8, 4] w5, int64[2] axes = {{2, 3}}>
    {{
        [first] a = Conv (x, w1)
        m = ReduceMean <keepdims = 1> (a, axes)
        [squeeze] s = Conv (m, w2)
        r = Relu (s)
        [excite] e = Conv (r, w3, b3)
        h = HardSigmoid (e)
        g1 = Mul (a, h)
        [last] y = Conv (g1, w4)
        f = Squeeze (m, axes)
        [fc] z = MatMul (f, w5)
    }}""")
    groups = check(model)
    assert groups["first"].producers == ("first", "excite")
    assert groups["first"].consumers == ("squeeze", "last", "fc")


def test_units_behind_a_group_normalisation_are_its_groups():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[12, 3, 1, 1] w1, float[12] s, float[12] b, float[5, 12, 1, 1] w2>
    {{
        [first] a = Conv (x, w1)
        [norm] c = GroupNormalization <num_groups = 4> (a, s, b)
        [last] y = Conv (c, w2)
    }}""", opset=21)  # fmt: skip
    groups = groups_by_name(model)
    assert groups["first"].units == 4
    check(model)


def test_group_normalisation_as_exporters_write_it():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[12, 3, 1, 1] w1, float[4] s, float[4] b, float[12, 1, 1] scale, float[5, 12, 1, 1] w2,
     int64[3] apart = {{0, 4, -1}}, int64[4] back = {{0, 12, 8, 8}}>
    {{
        [first] a = Conv (x, w1)
        c = Reshape (a, apart)
        d = InstanceNormalization (c, s, b)
        e = Reshape (d, back)
        f = Mul (e, scale)
        [last] y = Conv (f, w2)
    }}""")
    assert check(model)["first"].units == 4


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("LayerNormalization <axis = -1> (a, s)", "normalises over it"),
        ("Softmax <axis = -1> (a)", "normalises along it"),
        ("ReduceMean <keepdims = 1> (a, last)", "reduces it"),
        ("TopK <axis = -1> (a, k)", "TopK 'node', which isn't understood"),
        ("Add (a, x)", "with a value of fixed width"),
    ],
)
def test_where_units_are_mixed_they_stay(node, reason):
    outputs = "b, i" if "TopK" in node else "b"
    width = {"TopK": 16, "ReduceMean": 1}.get(node.split()[0], 16)
    model = network(f"""
    g ({TOKENS}) => (float[n, 6, 5] y)
    <float[16, 16] w1, float[16] s, float[{width}, 5] w2, int64[1] last = {{-1}}, int64[1] k = {{16}}>
    {{
        [first] a = MatMul (x, w1)
        [node] {outputs} = {node}
        [last] y = MatMul (b, w2)
    }}""")
    assert reason in (groups_by_name(model)["first"].skip or "")


def test_weights_that_are_computed_and_inner_graphs_keep_what_they_read():
    model = network(f"""
    g ({IMAGE}, bool c) => (float[n, 5, 8, 8] y, float[n, 6, 8, 8] z)
    <float[8, 3, 1, 1] w1, float[5, 8, 1, 1] w2, float[5, 8, 1, 1] delta, float[6, 3, 1, 1] w3>
    {{
        [first] a = Conv (x, w1)
        w = Add (w2, delta)
        [second] y = Conv (a, w)
        [third] b = Conv (x, w3)
        [choice] z = If (c) <
            then_branch = one () => (float[n, 6, 8, 8] p) {{ p = Relu (b) }},
            else_branch = other () => (float[n, 6, 8, 8] q) {{ q = Neg (b) }}
        >
    }}""")
    groups = groups_by_name(model)
    assert "its weight is computed" in (groups["first"].skip or "")
    assert groups["third"].skip == "If 'choice', which isn't understood"


def test_a_weight_that_is_used_twice_shrinks_for_both():
    model = network("""
    g (float[n, 3, 8, 8] x, float[n, 3, 8, 8] z) => (float[n, 5, 8, 8] y)
    <float[8, 3, 1, 1] w1, float[8, 8, 1, 1] w2, float[5, 8, 1, 1] w3>
    {
        [first] a = Conv (x, w1)
        [again] b = Conv (z, w1)
        [left] c = Conv (a, w2)
        [right] d = Conv (b, w2)
        e = Mul (c, d)
        [last] y = Conv (e, w3)
    }""")
    groups = check(model)
    assert groups["first"].producers == ("first", "again")
    assert groups["left"].consumers == ("last",)


def test_sizes_that_nodes_share_are_written_for_each():
    model = network("""
    g (float[n, 4] x) => (float[n, 5] y, float[n, 5] z)
    <float[4, 12] w1, float[4, 12] w2, float[12, 5] w3, int64[3] apart = {-1, 6, 2}, int64[2] flat = {-1, 12}>
    {
        [one] a = MatMul (x, w1)
        a1 = Reshape (a, apart)
        a2 = Reshape (a1, flat)
        [left] y = MatMul (a2, w3)
        [two] b = MatMul (x, w2)
        b1 = Reshape (b, apart)
        b2 = Transpose <perm = [0, 2, 1]> (b1)
        b3 = Reshape (b2, flat)
        [right] z = MatMul (b3, w3)
    }""")
    check(model)


def test_sizes_that_the_graph_reads_when_it_runs_follow_by_themselves():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 16, 16] y, float[n, 4] z)
    <float[8, 3, 1, 1] w1, float[5, 8, 1, 1] w2, float[8, 4] w3, int64[1] zero = {{0}}, int64[1] two = {{2}},
     int64[2] wide = {{16, 16}}, int64[1] one = {{1}}, int64[1] rest = {{-1}}, int64[2] axes = {{2, 3}}>
    {{
        [first] a = Conv (x, w1)
        shape = Shape (a)
        front = Slice (shape, zero, two)
        sizes = Concat <axis = 0> (front, wide)
        b = Resize <mode = "nearest"> (a, , , sizes)
        [second] y = Conv (b, w2)
        m = ReduceMean <keepdims = 1> (a, axes)
        channels = Gather <axis = 0> (shape, one)
        flat = Concat <axis = 0> (rest, channels)
        c = Reshape (m, flat)
        [third] z = MatMul (c, w3)
    }}""")
    group = check(model)["first"]
    assert (group.units, group.consumers) == (8, ("second", "third"))


def test_a_size_that_is_computed_with_stays():
    model = network(f"""
    g ({IMAGE}) => (float[n, 5, 8, 8] y)
    <float[8, 3, 1, 1] w1, float[5, 8, 1, 1] w2, int64 one = {{1}}>
    {{
        [first] a = Conv (x, w1)
        shape = Shape (a)
        channels = Gather <axis = 0> (shape, one)
        number = Cast <to = 1> (channels)
        [scale] b = Div (a, number)
        [second] y = Conv (b, w2)
    }}""")
    assert groups_by_name(model)["first"].skip == "Div 'scale' computes with its size"


@pytest.mark.parametrize("seed", range(20))
def test_reshaped_atoms_are_where_numpy_puts_them(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.choice([1, 2, 3, 4], 4).tolist())
    axis = int(rng.integers(4))
    flat = rng.permutation([2, 2, 3, *(size for size in shape)]).tolist()
    total = int(np.prod(shape))
    after, left = [], total
    for size in flat:  # a random factorisation of the same number of elements
        if left % size == 0:
            after.append(size)
            left //= size
    after = (*after, left)
    atoms = np.arange(shape[axis]) + 10
    spread = np.broadcast_to(atoms.reshape([-1 if k == axis else 1 for k in range(4)]), shape)
    found = reshaped([Factor((axis,), atoms)], shape, after)
    if shape[axis] == 1:
        return
    assert found is not None
    (factor,) = found
    assert np.array_equal(factor.spread(range(len(after)), after), spread.reshape(after))


def test_every_layer_of_a_graph_is_in_a_group():
    model = network("""
    g (float[n, 300] x) => (float[n, 1] y) <float[300, 1] w>
    { [only] y = MatMul (x, w) }""")
    (group,) = find_groups(model)
    assert (group.name, group.units, group.skip) == ("only", 1, "it has one unit only")

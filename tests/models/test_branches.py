"""Residual branches that go as a whole: which ones can, and what is left of the graph."""

import numpy as np
import onnx
import pytest

from onnx_spdy.models import GroupError, narrowed
from tests.models.narrowing import check_narrow_is_masked, groups_by_name, network

# A block of a ResNet after one that makes its input: conv, relu, conv, addition, relu; and what reads it.
RESIDUAL = """
g (float[n, 4, 8, 8] x) => (float[n, 3, 8, 8] y)
<float[6, 4, 1, 1] w0, float[6] b0, float[8, 6, 3, 3] w1, float[8] b1, float[6, 8, 3, 3] w2, float[6] b2,
 float[3, 6, 1, 1] w3>
{
    [stem] a = Conv (x, w0, b0)
    [relu] r = Relu (a)
    [first] c = Conv <pads = [1, 1, 1, 1]> (r, w1, b1)
    [inside] d = Relu (c)
    [second] e = Conv <pads = [1, 1, 1, 1]> (d, w2, b2)
    [sum] f = Add (e, r)
    [after] s = Relu (f)
    [head] y = Conv (s, w3)
}"""
LINEAR = RESIDUAL.replace("[relu] r = Relu (a)", "").replace("(r, w1, b1)", "(a, w1, b1)").replace("(e, r)", "(e, a)")
FEED_FORWARD = """
g (float[n, 5, 8] x) => (float[n, 5, 3] y)
<float[8, 8] w0, float[8] b0, float[8] scale, float[8] shift, float[8, 16] w1, float[16] b1, float[16, 8] w2,
 float[8] b2, float[8, 3] w3>
{
    [stem] a = MatMul (x, w0)
    [bias] b = Add (a, b0)
    [norm] m = LayerNormalization <axis = -1> (b, scale, shift)
    [first] c = MatMul (m, w1)
    [bias1] d = Add (c, b1)
    [gelu] h = Relu (d)
    [second] e = MatMul (h, w2)
    [bias2] f = Add (e, b2)
    [sum] s = Add (m, f)
    [norm2] t = LayerNormalization <axis = -1> (s, scale, shift)
    [head] y = MatMul (t, w3)
}"""


def names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


def test_a_block_goes_with_its_sum_and_its_second_activation() -> None:
    model = network(RESIDUAL)
    branch = groups_by_name(model)["first"].branch
    assert branch is not None
    assert branch.ends == ("second",)
    assert branch.gone == ("c", "d", "e")
    assert branch.left == ("f", "s")
    assert branch.dropped == ("b2",)  # behind the activation nothing could add it
    narrow = check_narrow_is_masked(model, {"first": []})
    assert names(narrow) == ["stem", "relu", "head"]
    assert [tensor.name for tensor in narrow.graph.initializer] == ["w0", "b0", "w3"]


def test_what_a_block_adds_goes_into_the_bias_before_it() -> None:
    model = network(LINEAR)
    branch = groups_by_name(model)["first"].branch
    assert branch is not None
    assert not branch.dropped
    narrow = check_narrow_is_masked(model, {"first": []})
    assert names(narrow) == ["stem", "after", "head"]
    biases = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name in ("b0", "b2")]
    (found,) = [onnx.numpy_helper.to_array(tensor) for tensor in narrow.graph.initializer if tensor.name == "b0"]
    np.testing.assert_allclose(found, sum(biases), rtol=1e-6)


def test_a_convolution_without_a_bias_gets_one() -> None:
    narrow = check_narrow_is_masked(network(LINEAR.replace("(x, w0, b0)", "(x, w0)")), {"first": []})
    assert names(narrow) == ["stem", "after", "head"]
    assert len(narrow.graph.node[0].input) == 3


@pytest.mark.parametrize("seed", range(4))
def test_other_groups_may_be_narrower_at_the_same_time(seed: int) -> None:
    model = network(LINEAR)
    groups = groups_by_name(model)
    kept = np.random.default_rng(seed).permutation(groups["stem"].units)[:4].tolist()
    narrow = check_narrow_is_masked(model, {"first": [], "stem": kept})
    assert {tuple(tensor.dims) for tensor in narrow.graph.initializer} == {(4, 4, 1, 1), (4,), (3, 4, 1, 1)}


def test_a_feed_forward_block_goes_into_the_normalisation_before_it() -> None:
    model = network(FEED_FORWARD.replace("(s, scale, shift)", "(s, scale)"))
    assert groups_by_name(model)["first"].branch is not None
    narrow = check_narrow_is_masked(model, {"first": []})
    assert names(narrow) == ["stem", "bias", "norm", "norm2", "head"]


def test_a_normalisation_that_is_read_elsewhere_too_leaves_the_addition() -> None:
    narrow = check_narrow_is_masked(network(FEED_FORWARD), {"first": []})  # `shift` belongs to both
    assert names(narrow) == ["stem", "bias", "norm", "sum", "norm2", "head"]


def test_what_an_activation_makes_of_the_bias_is_kept() -> None:
    """SiLU between the last convolution and the sum, as in YOLOX."""
    text = LINEAR.replace(
        "[sum] f = Add (e, a)", "[gate] g1 = Sigmoid (e)\n[silu] g2 = Mul (e, g1)\n[sum] f = Add (a, g2)"
    )
    model = network(text)
    branch = groups_by_name(model)["first"].branch
    assert branch is not None
    assert branch.gone == ("c", "d", "e", "g1", "g2")
    assert names(check_narrow_is_masked(model, {"first": []})) == ["stem", "after", "head"]


def test_a_sum_that_leaves_the_graph_stays() -> None:
    text = LINEAR.replace("=> (float[n, 3, 8, 8] y)", "=> (float[n, 3, 8, 8] y, float[n, 6, 8, 8] f)")
    narrow = check_narrow_is_masked(network(text), {"first": []})
    assert names(narrow) == ["stem", "sum", "after", "head"]


def test_a_branch_inside_of_another_goes_with_it() -> None:
    """A bottleneck: what its second layer takes in is no branch, since an activation follows it."""
    text = RESIDUAL.replace("(d, w2, b2)", "(z, w2, b2)").replace(
        "[second]", "[middle] p = Conv (d, wm)\n[between] z = Relu (p)\n[second]"
    )
    model = network(text.replace("float[6] b2", "float[6] b2, float[8, 8, 1, 1] wm"))
    groups = groups_by_name(model)
    assert groups["first"].branch is None
    assert groups["middle"].branch is not None
    assert names(check_narrow_is_masked(model, {"middle": [], "first": [1, 2]})) == ["stem", "relu", "head"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[sum] f = Add (e, r)", "[sum] f = Mul (e, r)"),  # nothing is left of the product
        ("[sum] f = Add (e, r)", "[sum] f = Identity (e)"),
        ("(s, w3)", "(d8, w3)"),  # the units are read by a layer that isn't part of the branch
        ("=> (float[n, 3, 8, 8] y)", "=> (float[n, 3, 8, 8] y, float[n, 6, 8, 8] e)"),
    ],
)
def test_what_is_no_branch_keeps_a_unit(before: str, after: str) -> None:
    text = RESIDUAL.replace(before, after)
    if "d8" in after:
        text = text.replace("[head]", "[other] d8 = Conv (d, w4)\n[head]").replace(
            "float[3, 6, 1, 1] w3", "float[3, 6, 1, 1] w3, float[6, 8, 1, 1] w4"
        )
    model = network(text)
    assert groups_by_name(model)["first"].branch is None
    with pytest.raises(GroupError, match="none of the 8 units of group 'first' is kept"):
        narrowed(model, {"first": []})


def test_smaller_values_that_are_broadcast_in_the_sum_are_no_branch() -> None:
    """Without the branch the sum would have another shape."""
    text = RESIDUAL.replace("[sum] f = Add (e, r)", "[pool] q = GlobalAveragePool (r)\n[sum] f = Add (e, q)")
    assert groups_by_name(network(text))["first"].branch is None

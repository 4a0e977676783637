"""What levels are chosen for: layers or groups of units, and how many units a width leaves."""

import numpy as np
import onnx
import pytest
import torch

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.level import DENSE, Level, levels_for
from onnx_spdy.pipeline.site import NothingToPrune, find_sites
from tests.models.narrowing import network as network_of


def two_products(units: int) -> Prepared:
    rng = np.random.default_rng(0)
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node("MatMul", ["b", "w1"], ["y"], "second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [
            onnx.numpy_helper.from_array(rng.normal(size=size).astype(np.float32), name)
            for name, size in (("w0", (8, units)), ("w1", (units, 4)))
        ],
    )
    return Prepared(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


def test_zeros_are_for_layers_and_widths_for_groups():
    network = two_products(128)
    assert [site.group for site in find_sites(network, levels_for("unstructured"))] == [None, None]
    (site,) = find_sites(network, levels_for("channels"))
    assert (site.name, [layer.name for layer in site.layers]) == ("first", ["second"])
    assert site.inputs(site.layers[0]) == tuple((unit,) for unit in range(128))


@pytest.mark.parametrize(
    ("units", "sparsity", "kept"),
    [(128, 0.25, 96), (128, 0.3, 80), (128, 0.975, 16), (100, 0.025, 96), (64, 0.5, 32), (64, 0.975, 16),
     (32, 0.5, 16), (16, 0.75, 4), (8, 0.5, 4), (3, 0.5, 1)],
)  # fmt: skip
def test_a_width_removes_at_least_its_fraction_in_whole_steps(units, sparsity, kept):
    (site,) = find_sites(two_products(units), levels_for("channels"))
    assert site.kept(Level("channels", sparsity)) == kept
    assert site.kept(DENSE) == units


def test_wider_levels_never_keep_less():
    (site,) = find_sites(two_products(144), levels_for("channels"))
    kept = [site.kept(level) for level in levels_for("channels")]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 16


def test_a_network_without_groups_is_told():
    with pytest.raises(NothingToPrune, match="no group of units that can shrink"):
        find_sites(two_products(1), levels_for("channels"))


def test_the_width_of_a_residual_stream_is_chosen_for_all_that_take_it_in():
    network = Prepared(
        network_of("""
    g (float[n, 8] x) => (float[n, 4] y)
    <float[8, 16] w0, float[16, 32] w1, float[32, 16] w2, float[16, 24] w3, float[24, 16] w4, float[16, 4] w5>
    {
        [stem] s = MatMul (x, w0)
        [up] a = MatMul (s, w1)
        [relu] b = Relu (a)
        [down] c = MatMul (b, w2)
        [add] t = Add (s, c)
        [up2] d = MatMul (t, w3)
        [relu2] e = Relu (d)
        [down2] f = MatMul (e, w4)
        [add2] u = Add (t, f)
        [head] y = MatMul (u, w5)
    }""")
    )
    sites = {site.name: site for site in find_sites(network, levels_for("channels"))}
    assert {name: [layer.name for layer in site.layers] for name, site in sites.items()} == {
        "stem": ["up", "up2", "head"], "up": ["down"], "up2": ["down2"],
    }  # fmt: skip
    assert sites["stem"].group is not None
    assert set(sites["stem"].group.producers) == {"stem", "down", "down2"}
    # A unit of the stream is as large as all the weights that read it, in all of these layers.
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in network.proto.graph.initializer}
    expected = np.sqrt(sum(np.square(stored[name]).sum(1) for name in ("w1", "w3", "w5")))
    found = sites["stem"].magnitudes(lambda name: torch.from_numpy(stored[name].copy()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)

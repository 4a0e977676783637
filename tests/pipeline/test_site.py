"""What levels are chosen for: layers or groups of units, and how many units a width leaves."""

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.level import DENSE, Level, levels_for
from onnx_spdy.pipeline.site import NothingToPrune, find_sites


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

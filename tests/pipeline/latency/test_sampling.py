import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Layer, find_layers
from onnx_spdy.pipeline.latency.sampling import (
    DENSE_EVERY,
    MOST_AWAITED,
    NETWORKS,
    columns_of,
    plan_networks,
    predecessors,
)
from onnx_spdy.pipeline.level import levels_for

LEVELS = levels_for("unstructured")


def test_the_plan_shows_every_layer_dense_and_at_all_heights() -> None:
    plan = plan_networks(np.ones((9, 42), bool), LEVELS, np.random.default_rng(0))
    assert plan.shape == (NETWORKS, 9)
    assert (~plan.any(axis=1)).sum() == NETWORKS // DENSE_EVERY
    mixed = plan[plan.any(axis=1)]
    assert ((mixed == 0).sum(axis=0) >= 2).all()
    assert (mixed.max(axis=0) > 36).all()
    assert (np.where(mixed == 0, 41, mixed).min(axis=0) < 6).all()
    assert not plan_networks(np.zeros((9, 42), bool), LEVELS, np.random.default_rng(0)).any()


def test_the_layer_before_is_found_through_everything_between(model: onnx.ModelProto) -> None:
    layers = [layer for layer in find_layers(model) if layer.prunable]
    predecessor, source = predecessors(model.graph, layers)
    assert predecessor.tolist() == [-1, 0, 1, 2]
    assert source["flat"] == 1
    assert source["output"] == 3


def test_many_skip_connections_are_cut_down() -> None:
    """Six layers that all wait until the end: the solver would have to carry all of them."""
    weight = numpy_helper.from_array(np.ones((16, 16), np.float32), "w")
    first = [helper.make_node("MatMul", ["input", "w"], [f"a{n}"], f"first{n}") for n in range(6)]
    last = [helper.make_node("MatMul", [f"a{n}", "w"], [f"b{n}"], f"last{n}") for n in range(6)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*first, *last],
        "skips",
        [value("input", TensorProto.FLOAT, [4, 16])],
        [value(f"b{n}", TensorProto.FLOAT, [4, 16]) for n in range(6)],
        [weight],
    )
    layers = [Layer(node.name, "MatMul", "w", None, node.output[0], (16, 16), True, None) for node in graph.node]
    predecessor, _ = predecessors(graph, layers)
    assert predecessor.tolist()[:6] == [-1] * 6
    assert set(predecessor.tolist()[6:]) == {-1, 2, 3, 4, 5}
    awaited = [len({int(one) for one in predecessor[n + 1 :] if 0 <= one <= n}) for n in range(len(predecessor))]
    assert max(awaited) == MOST_AWAITED


def test_every_pattern_gets_its_turn() -> None:
    levels = levels_for("unstructured,blockout4,2:4")
    columns = columns_of(levels)
    assert [len(own) for own in columns.values()] == [41, 41, 1]
    assert sorted(column for own in columns.values() for column in own) == [*range(1, 84)]
    plan = plan_networks(np.ones((9, len(levels)), bool), levels, np.random.default_rng(0))
    assert len(plan) > NETWORKS
    for own in columns.values():
        assert (np.isin(plan, own).sum(axis=0) >= 5).all()  # of each layer

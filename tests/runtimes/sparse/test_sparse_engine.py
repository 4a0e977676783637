"""The sparse engine against ONNX Runtime's own kernels."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

pytest.importorskip("onnxruntime_ep_spdy", reason="onnxruntime_ep_spdy isn't installed: pip install ./runtimes/sparse")
onnxruntime = pytest.importorskip("onnxruntime", minversion="1.23")

from tests.runtimes.sparse.random_graphs import (  # noqa: E402
    TOLERANCE,
    Graph,
    compare,
    instruction_sets,
    largest_difference,
    session,
)

SETS = instruction_sets()
BACKEND_CASES = ("test_conv_", "test_basic_conv_", "test_gemm_", "test_matmul_")
GRAPHS, GRAPHS_OF_A_TEST = 360, 30


def taken(model: onnx.ModelProto, **options: str) -> list[list[str]]:
    """Operators of each region that the engine takes."""
    import onnxruntime_ep_spdy

    onnxruntime_ep_spdy.register()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    devices = [one for one in onnxruntime.get_ep_devices() if one.ep_name == onnxruntime_ep_spdy.get_ep_name()]
    settings.add_provider_for_devices(devices, options)
    made = onnxruntime.InferenceSession(model.SerializeToString(), settings)
    regions = [
        [node.op_type for node in region.get_nodes()]
        for region in made.get_provider_graph_assignment_info()
        if region.ep_name == onnxruntime_ep_spdy.get_ep_name()
    ]
    return sorted(regions, key=len)


def assert_same(model: onnx.ModelProto, inputs: dict[str, np.ndarray], **options: str) -> None:
    wanted = session(model, sparse=False).run(None, inputs)
    for isa in SETS:
        found = session(model, sparse=True, isa=isa, **options).run(None, inputs)
        for one, other in zip(found, wanted, strict=True):
            assert largest_difference(one, other) <= TOLERANCE, isa


def conv(weight: np.ndarray, shape: list[int | str], **attributes: object) -> onnx.ModelProto:
    graph = Graph(np.random.default_rng(0))
    return graph.model({"x": shape}, [graph.node("Conv", ["x", graph.constant(weight)], **attributes)])


def residual_network(rng: np.random.Generator, sparsity: float = 0.9) -> onnx.ModelProto:
    """Two blocks of a ResNet, the second with a stride, of any batch, height and width."""
    graph, x, channels = Graph(rng), "x", 16
    for width, stride in ((16, 1), (32, 2)):
        shortcut = x
        for k, step in ((0, stride), (1, 1)):
            weight = graph.sparse(width, channels if k == 0 else width, 3, 3, sparsity=sparsity)
            inputs = [x, graph.constant(weight), graph.constant(rng.normal(size=width))]
            x = graph.node("Conv", inputs, pads=[1] * 4, strides=[step] * 2)
            if k == 0:
                x = graph.node("Relu", [x])
        if stride > 1:
            weight = graph.sparse(width, channels, 1, 1, sparsity=sparsity)
            shortcut = graph.node("Conv", [shortcut, graph.constant(weight)], strides=[stride] * 2)
        x = graph.node("Relu", [graph.node("Add", [x, shortcut])])
        channels = width
    return graph.model({"x": ["n", 16, "h", "w"]}, [x])


def image(*shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system doesn't say what its processor can")
def test_every_instruction_set_of_this_machine_is_used() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert ("avx2" in SETS) == ({"avx2", "fma"} <= flags)
    assert ("avx512" in SETS) == ({"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags)


@pytest.mark.parametrize("first", range(0, GRAPHS, GRAPHS_OF_A_TEST))
def test_random_graphs_agree_with_onnx_runtime(first: int) -> None:
    for seed in range(first, first + GRAPHS_OF_A_TEST):
        assert compare(seed, SETS) <= TOLERANCE, seed


def test_a_network_of_residual_blocks_is_one_region_of_any_size() -> None:
    model = residual_network(np.random.default_rng(0))
    assert [len(region) for region in taken(model)] == [len(model.graph.node)]
    dense = session(model, sparse=False)
    for isa in SETS:
        sparse = session(model, sparse=True, isa=isa)
        for shape in ((1, 16, 8, 8), (3, 16, 9, 17), (1, 16, 1, 1), (17, 16, 5, 4), (3, 16, 9, 17), (1, 16, 40, 3)):
            found, wanted = (one.run(None, image(*shape))[0] for one in (sparse, dense))
            assert largest_difference(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_layers_with_few_zeros_stay_with_onnx_runtime(op: str) -> None:
    graph = Graph(np.random.default_rng(0))
    shape = (8, 8, 3, 3) if op == "Conv" else (64, 64)
    for sparsity in (0.6, 0.9):
        name = graph.constant(graph.sparse(*shape, sparsity=sparsity))
        graph.node(op, [f"x{sparsity}", name])
    outputs = [node.output[0] for node in graph.nodes]
    inputs: dict[str, list[int | str]] = {f"x{s}": [2, 8, 9, 9] if op == "Conv" else [5, 64] for s in (0.6, 0.9)}
    model = graph.model(inputs, outputs)
    assert taken(model, min_sparsity="0.8") == [[op]]
    assert taken(model, min_sparsity="0.5") == [[op], [op]]
    assert taken(model, min_sparsity="1") == []


def test_zeros_in_blocks_of_channels_are_taken_where_single_ones_are_not() -> None:
    for block, regions in ((1, []), (4, [["Conv"]])):
        weight = Graph(np.random.default_rng(0)).sparse(64, 64, 3, 3, sparsity=0.6, block=block)
        assert taken(conv(weight, [1, 64, 9, 9])) == regions
    weight = Graph(np.random.default_rng(0)).sparse(64, 64, 3, 3, sparsity=0.9)
    assert taken(conv(weight, [1, 64, 9, 9])) == [["Conv"]]


def test_what_is_not_understood_stays_with_onnx_runtime() -> None:
    rng = np.random.default_rng(0)
    graph = Graph(rng)
    weight = graph.constant(graph.sparse(8, 1, 3, 3, sparsity=0.9))
    depthwise = graph.node("Conv", ["x", weight], group=8)
    computed = graph.node("MatMul", ["a", graph.node("Relu", ["b"])])
    left = graph.node("Gemm", ["a", graph.constant(graph.sparse(6, 3, sparsity=0.9))], transA=1)
    volume = graph.node("Conv", ["v", graph.constant(graph.sparse(8, 4, 3, 3, 3, sparsity=0.9))])
    model = graph.model(
        {"x": [2, 8, 9, 9], "a": [6, 6], "b": [6, 6], "v": [1, 4, 5, 5, 5]}, [depthwise, computed, left, volume]
    )
    assert taken(model, min_sparsity="0") == []


def test_regions_make_no_cycle_around_a_node_of_onnx_runtime() -> None:
    rng = np.random.default_rng(0)
    graph = Graph(rng)
    weights = [graph.constant(graph.sparse(4, 4, 3, 3, sparsity=0.5)) for _ in range(3)]
    first = graph.node("Conv", ["x", weights[0]], pads=[1] * 4)
    outside = graph.node("Softmax", [first], axis=1)
    second = graph.node("Conv", [outside, weights[1]], pads=[1] * 4)
    last = graph.node("Conv", [graph.node("Add", [first, second]), weights[2]], pads=[1] * 4)
    model = graph.model({"x": [2, 4, 7, 7]}, [last])
    assert [len(region) for region in taken(model, min_sparsity="0")] == [1, 3]
    assert_same(model, image(2, 4, 7, 7))


def test_a_value_that_a_subgraph_reads_is_handed_out() -> None:
    rng = np.random.default_rng(0)
    graph = Graph(rng)
    first = graph.node("Conv", ["x", graph.constant(graph.sparse(4, 4, 3, 3, sparsity=0.5))], pads=[1] * 4)
    branches = {}
    for name, op in (("then_branch", "Sin"), ("else_branch", "Cos")):
        node = helper.make_node(op, [first], [f"{op}_out"])
        output = helper.make_tensor_value_info(f"{op}_out", onnx.TensorProto.FLOAT, [2, 4, 7, 7])
        branches[name] = helper.make_graph([node], op, [], [output])
    graph.nodes.append(helper.make_node("If", ["choice"], ["chosen"], **branches))
    last = graph.node(
        "Conv", [graph.node("Add", [first, "chosen"]), graph.constant(graph.sparse(4, 4, 3, 3, sparsity=0.5))]
    )
    model = graph.model({"x": [2, 4, 7, 7]}, [last])
    model.graph.input.append(helper.make_tensor_value_info("choice", onnx.TensorProto.BOOL, []))
    assert_same(model, {**image(2, 4, 7, 7), "choice": np.array(True)})


def test_pruned_weights_hide_nan_and_inf_in_weights_are_kept() -> None:
    weight = np.zeros((4, 2, 3, 3), np.float32)
    weight[0, 0, 1, 1], weight[1, 1, 0, 2], weight[2, 0, 1, 1] = np.nan, np.inf, -np.inf
    model = conv(weight, [2, 2, 6, 6], pads=[1] * 4)
    x = np.abs(image(2, 2, 6, 6)["x"]) + 0.1
    for isa in SETS:
        found = session(model, sparse=True, isa=isa).run(None, {"x": x})[0]
        assert np.isnan(found[:, 0]).all() and (found[:, 2] == -np.inf).all() and not found[:, 3].any()
        assert np.isinf(found[:, 1, 1:, :-1]).all()


@pytest.mark.parametrize("channels", [1, 3, 4, 9])
def test_a_layer_of_zeros_is_its_bias(channels: int) -> None:
    graph = Graph(np.random.default_rng(0))
    zeros = graph.constant(np.zeros((channels, 3, 3, 3), np.float32))
    bias = graph.constant(np.arange(channels))
    model = graph.model({"x": [2, 3, 5, 5]}, [graph.node("Conv", ["x", zeros, bias], pads=[1] * 4)])
    assert_same(model, image(2, 3, 5, 5))


@pytest.mark.parametrize("shape", [(0, 2, 6, 6), (0, 2, 3, 3)])
def test_an_empty_batch_gives_an_empty_result(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 2, 3, 3)).astype(np.float32)
    assert_same(conv(weight, ["n", 2, "h", "w"]), image(*shape))


def test_no_rows_give_no_rows() -> None:
    graph = Graph(np.random.default_rng(0))
    product = graph.node("MatMul", ["x", graph.constant(graph.sparse(6, 5, sparsity=0.5))])
    model = graph.model({"x": ["a", "b", 6]}, [graph.node("Relu", [product])])
    for shape in ((0, 3, 6), (2, 0, 6), (2, 3, 6)):
        assert_same(model, image(*shape))


def test_pads_may_be_larger_than_the_image() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 2, 3, 3)).astype(np.float32)
    assert_same(conv(weight, ["n", 2, "h", "w"], pads=[50, 0, 3, 70], strides=[7, 2]), image(3, 2, 2, 1))


def test_a_kernel_larger_than_its_input_is_an_error_and_the_session_lives() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 2, 5, 5)).astype(np.float32)
    made = session(conv(weight, ["n", 2, "h", "w"]), sparse=True)
    with pytest.raises(Exception, match="larger than its padded input"):
        made.run(None, image(1, 2, 4, 4))
    assert made.run(None, image(1, 2, 5, 5))[0].shape == (1, 4, 1, 1)


def test_more_memory_than_there_is_is_an_error_and_the_session_lives() -> None:
    weight = np.random.default_rng(0).normal(size=(1, 1, 2, 2)).astype(np.float32)
    attributes = {"pads": [1 << 23] * 4, "strides": [1 << 23] * 2}
    made = session(conv(weight, ["n", 1, "h", "w"], pads=attributes["pads"]), sparse=True)
    with pytest.raises(Exception, match=r"SpdyExecutionProvider|alloc|Memory|memory|overflow"):
        made.run(None, image(1, 1, 2, 2))
    assert session(conv(weight, ["n", 1, "h", "w"]), sparse=True).run(None, image(1, 1, 2, 2))[0].shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"), [({"isa": "abacus"}, "isa"), ({"min_sparsity": "many"}, "min_sparsity")]
)
def test_an_option_that_makes_no_sense_is_an_error(options: dict[str, str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        session(conv(np.zeros((1, 1, 1, 1), np.float32), [1, 1, 1, 1]), sparse=True, **options)


def test_eight_threads_on_one_session_get_the_bits_of_one() -> None:
    model = residual_network(np.random.default_rng(0))
    shapes = [(2, 16, 12, 12), (5, 16, 7, 9)]
    made = session(model, sparse=True, threads=2)
    alone = [session(model, sparse=True).run(None, image(*shapes[k % 2], seed=k))[0] for k in range(8)]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(10):
            found = made.run(None, image(*shapes[number % 2], seed=number))[0]
            if not np.array_equal(found, alone[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_sessions_leave_nothing_behind() -> None:
    model = residual_network(np.random.default_rng(0))
    inputs = image(4, 16, 32, 32)
    process, sizes = psutil.Process(), []
    for number in range(200):
        session(model, sparse=True).run(None, inputs)
        if number in (99, 199):
            sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < 4e6


def backend_cases() -> list[tuple[str, onnx.ModelProto, list[np.ndarray], np.ndarray]]:
    """(name, model, inputs, output) of the suite's cases of one Conv, Gemm or MatMul in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other operators' cases, which are computed as well
        cases = [case for case in load_model_tests(kind="node") if case.name.startswith(BACKEND_CASES)]
    return [
        (case.name, case.model, list(inputs), outputs[0])
        for case in cases
        for inputs, outputs in case.data_sets or []
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in ("Conv", "Gemm", "MatMul")
        if outputs[0].dtype == np.float32
    ]


def test_cases_of_the_onnx_backend_suite() -> None:
    """Their weights are inputs; here they are constants, so that the engine takes them."""
    cases = backend_cases()
    assert len(cases) >= 20
    for name, model, arrays, wanted in cases:
        first, *others = list(model.graph.input)
        constants = [numpy_helper.from_array(a, v.name) for a, v in zip(arrays[1:], others, strict=True)]
        model.graph.initializer.extend(constants)
        del model.graph.input[1:]
        for isa in SETS:
            found = session(model, sparse=True, isa=isa).run(None, {first.name: arrays[0]})[0]
            assert largest_difference(found, wanted) <= TOLERANCE, name

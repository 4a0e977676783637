"""Odd but mostly valid networks: what exporters and people do to graphs, one to three times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_spdy.tools.fuzz.damage import Files

LAYERS = ("Conv", "Gemm", "MatMul")


def odd(model: onnx.ModelProto, rng: np.random.Generator) -> tuple[Files, str]:
    """An odd copy, and what was done to it."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    done = []
    for _ in range(int(rng.integers(1, 4))):
        change = CHANGES[int(rng.integers(len(CHANGES)))]
        change(copied.graph, rng)
        done.append(change.__name__.strip("_"))
    return Files(copied.SerializeToString()), ", ".join(done)


def _any(items, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _layer(graph: GraphProto, rng: np.random.Generator) -> tuple[NodeProto, TensorProto] | None:
    """A layer and its weight, or None where there is none left."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found = [(n, tensors[n.input[1]]) for n in graph.node if n.op_type in LAYERS and n.input[1] in tensors]
    return _any(found, rng) if found else None


def _set(tensor: TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _weights(graph: GraphProto, rng: np.random.Generator, change: Callable[[np.ndarray], np.ndarray]) -> None:
    if found := _layer(graph, rng):
        values = numpy_helper.to_array(found[1])
        _set(found[1], change(values).astype(values.dtype))


def zero_weights(graph: GraphProto, rng: np.random.Generator) -> None:
    _weights(graph, rng, np.zeros_like)


def one_weight_is_large(graph: GraphProto, rng: np.random.Generator) -> None:
    size = float(_any([1e4, 1e10, 1e19, 3e38], rng))

    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values.flat[int(rng.integers(values.size))] = size
        return values

    with np.errstate(over="ignore"):
        _weights(graph, rng, change)


def scaled_weights(graph: GraphProto, rng: np.random.Generator) -> None:
    with np.errstate(over="ignore"):
        _weights(graph, rng, lambda values: values * float(_any([1e-42, 1e-30, 1e-8, 1e8, 1e20, 1e37], rng)))


def equal_weights(graph: GraphProto, rng: np.random.Generator) -> None:
    _weights(graph, rng, np.ones_like)


def negative_zeros(graph: GraphProto, rng: np.random.Generator) -> None:
    _weights(graph, rng, lambda values: np.where(values > 0, values, -0.0))


def rows_of_zeros(graph: GraphProto, rng: np.random.Generator) -> None:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[::2] = 0
        return values

    _weights(graph, rng, change)


def weight_is_a_constant_node(graph: GraphProto, rng: np.random.Generator) -> None:
    if found := _layer(graph, rng):
        graph.initializer.remove(found[1])
        graph.node.insert(0, helper.make_node("Constant", [], [found[1].name], value=found[1]))


def weight_is_an_input_too(graph: GraphProto, rng: np.random.Generator) -> None:
    if found := _layer(graph, rng):
        graph.input.append(helper.make_tensor_value_info(found[1].name, found[1].data_type, list(found[1].dims)))


def weight_is_an_output_too(graph: GraphProto, rng: np.random.Generator) -> None:
    if found := _layer(graph, rng):
        graph.output.append(helper.make_tensor_value_info(found[1].name, found[1].data_type, list(found[1].dims)))


def weight_behind_identity(graph: GraphProto, rng: np.random.Generator) -> None:
    if found := _layer(graph, rng):
        name = f"{found[1].name}_same"
        found[0].input[1] = name
        graph.node.insert(0, helper.make_node("Identity", [found[1].name], [name]))


def weight_with_another_reader(graph: GraphProto, rng: np.random.Generator) -> None:
    if found := _layer(graph, rng):
        graph.node.append(helper.make_node("Abs", [found[1].name], ["read_again"]))
        graph.output.append(helper.make_tensor_value_info("read_again", found[1].data_type, list(found[1].dims)))


def inner_value_is_an_output(graph: GraphProto, rng: np.random.Generator) -> None:
    name = _any([name for node in graph.node for name in node.output if name], rng)
    if name not in {value.name for value in graph.output}:
        graph.output.append(helper.make_empty_tensor_value_info(name))


def input_is_an_output(graph: GraphProto, rng: np.random.Generator) -> None:
    node = helper.make_node("Identity", [graph.input[0].name], ["passed"])
    graph.node.append(node)
    graph.output.append(helper.make_value_info("passed", graph.input[0].type))


def constant_output(graph: GraphProto, rng: np.random.Generator) -> None:
    graph.initializer.append(numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "fixed"))
    graph.node.append(helper.make_node("Identity", ["fixed"], ["fixed_out"]))
    graph.output.append(helper.make_tensor_value_info("fixed_out", TensorProto.FLOAT, [2, 3]))


def unused_input(graph: GraphProto, rng: np.random.Generator) -> None:
    graph.input.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, _any([[], ["batch", 2]], rng)))


def unused_nodes(graph: GraphProto, rng: np.random.Generator) -> None:
    graph.node.append(helper.make_node("Relu", [graph.input[0].name], ["nobody_reads"]))


def outputs_turned(graph: GraphProto, rng: np.random.Generator) -> None:
    outputs = [*graph.output][::-1]
    del graph.output[:]
    graph.output.extend(outputs)


def one_output_of_another_kind(graph: GraphProto, rng: np.random.Generator) -> None:
    """An index, a truth, a shape, one number of all samples, something without samples."""
    name = graph.output[0].name
    node, kind, shape = _any(
        [
            (helper.make_node("ArgMax", [name], ["kind"], axis=-1, keepdims=0), TensorProto.INT64, None),
            (helper.make_node("Shape", [name], ["kind"]), TensorProto.INT64, None),
            (helper.make_node("Cast", [name], ["kind"], to=TensorProto.BOOL), TensorProto.BOOL, None),
            (helper.make_node("Cast", [name], ["kind"], to=TensorProto.FLOAT16), TensorProto.FLOAT16, None),
            (helper.make_node("Cast", [name], ["kind"], to=TensorProto.DOUBLE), TensorProto.DOUBLE, None),
            (helper.make_node("ReduceMean", [name], ["kind"], keepdims=0), TensorProto.FLOAT, []),
            (helper.make_node("NonZero", [name], ["kind"]), TensorProto.INT64, None),
            (helper.make_node("SequenceConstruct", [name], ["kind"]), None, None),
        ],
        rng,
    )
    graph.node.append(node)
    value = helper.make_empty_tensor_value_info("kind")
    if kind is not None:
        value = helper.make_tensor_value_info("kind", kind, shape)
    else:
        value.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    if rng.random() < 0.5:
        del graph.output[0]
    graph.output.append(value)


def output_is_infinite(graph: GraphProto, rng: np.random.Generator) -> None:
    """NaN or infinite in all samples."""
    name = graph.output[0].name
    graph.initializer.append(numpy_helper.from_array(np.float32(_any([np.inf, np.nan, -np.inf, 3e38], rng)), "limit"))
    graph.node.append(helper.make_node(_any(["Add", "Mul"], rng), [name, "limit"], ["limited"]))
    graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("limited"))
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT


def constant_network(graph: GraphProto, rng: np.random.Generator) -> None:
    """The output doesn't depend on the input."""
    graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    name = graph.output[0].name
    graph.node.append(helper.make_node("Mul", [name, "nothing"], ["still"]))
    graph.output[0].name = "still"


def sizes_without_names(graph: GraphProto, rng: np.random.Generator) -> None:
    for value in [*graph.input, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()


def all_sizes_open(graph: GraphProto, rng: np.random.Generator) -> None:
    for value in graph.input:
        for number, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"size{number}"


def batch_is_fixed(graph: GraphProto, rng: np.random.Generator) -> None:
    size = int(_any([1, 2, 8, 5], rng))
    for value in [*graph.input, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "batch":
                dim.dim_value = size


def no_output_shapes(graph: GraphProto, rng: np.random.Generator) -> None:
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def wrong_output_shape(graph: GraphProto, rng: np.random.Generator) -> None:
    dims = graph.output[0].type.tensor_type.shape.dim
    if dims:
        _any(dims, rng).dim_value = int(rng.integers(1, 9))


def names_that_are_odd(graph: GraphProto, rng: np.random.Generator) -> None:
    """Of nodes; then of a weight."""
    for number, node in enumerate(graph.node):
        node.name = str(_any(["", "same", "a/b", "../x", "a b", "\N{SNOWMAN}", "n" * 300, f"{number}"], rng))
    if found := _layer(graph, rng):
        old, new = found[1].name, str(_any(["target", "a.b.weight", "1", "../w", "\N{SNOWMAN}", "w" * 300], rng))
        found[1].name = new
        for node in graph.node:
            for number, name in enumerate(node.input):
                node.input[number] = new if name == old else name


def input_called(graph: GraphProto, rng: np.random.Generator) -> None:
    """An inner value gets a name that something else may have in a folder or in Python."""
    old, new = graph.node[0].output[0], str(_any(["target", "self", "inputs", "None", "x.y", "0", "out put"], rng))
    for node in graph.node:
        for number, name in enumerate(node.input):
            node.input[number] = new if name == old else name
        for number, name in enumerate(node.output):
            node.output[number] = new if name == old else name


def dropout_and_identity(graph: GraphProto, rng: np.random.Generator) -> None:
    name = graph.output[0].name
    graph.node.append(helper.make_node("Identity", [name], ["once"]))
    graph.node.append(helper.make_node("Dropout", ["once"], ["twice", "mask"]))
    graph.output[0].name = "twice"


def one_more_layer(graph: GraphProto, rng: np.random.Generator) -> None:
    """A layer of an odd shape on the output: one unit, many, an empty one."""
    dims = [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim]
    if not dims or not dims[-1]:
        return
    width = int(_any([1, 2, 3, 17, 64, 0], rng))
    weight = rng.standard_normal((dims[-1], width)).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(weight, "more_w"))
    graph.node.append(helper.make_node("MatMul", [graph.output[0].name, "more_w"], ["more"]))
    graph.output[0].name = "more"
    graph.output[0].type.tensor_type.shape.dim[len(dims) - 1].dim_value = width


def one_weight_for_two(graph: GraphProto, rng: np.random.Generator) -> None:
    """The same layer again on the same input, its output added."""
    if found := _layer(graph, rng):
        again = NodeProto()
        again.CopyFrom(found[0])
        again.name, again.output[0] = "again", "again"
        graph.node.insert([*graph.node].index(found[0]) + 1, again)
        graph.output.append(helper.make_empty_tensor_value_info("again"))
        graph.output[-1].type.tensor_type.elem_type = TensorProto.FLOAT


CHANGES: list[Callable[[GraphProto, np.random.Generator], None]] = [
    zero_weights, one_weight_is_large, scaled_weights, equal_weights, negative_zeros, rows_of_zeros,
    weight_is_a_constant_node, weight_is_an_input_too, weight_is_an_output_too, weight_behind_identity,
    weight_with_another_reader, inner_value_is_an_output, input_is_an_output, constant_output, unused_input,
    unused_nodes, outputs_turned, one_output_of_another_kind, output_is_infinite, constant_network,
    sizes_without_names, all_sizes_open, batch_is_fixed, no_output_shapes, wrong_output_shape, names_that_are_odd,
    input_called, dropout_and_identity, one_more_layer, one_weight_for_two,
]  # fmt: skip

"""A metric sees each sample's outputs once, whatever axis they are on and however many samples the last batch has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.metric import MetricError, top1, value_of
from onnx_spdy.pipeline.rows import RowsError
from onnx_spdy.pipeline.validate import EVALUATION_BATCH, evaluate

POSITIONS, WIDTH, CLASSES = 5, 8, 4

OUTPUTS = {  # name -> nodes from (samples, positions, classes), shape
    "first": ([("Identity", {}, [])], ["batch", POSITIONS, CLASSES]),
    "second": ([("Transpose", {"perm": [1, 0, 2]}, [])], [POSITIONS, "batch", CLASSES]),
    "flat": ([("Reshape", {}, ["flat_shape"])], ["rows", CLASSES]),
    "flat, positions first": (
        [("Transpose", {"perm": [1, 0, 2]}, []), ("Reshape", {}, ["flat_shape"])],
        ["rows", CLASSES],
    ),
    "last": ([("Transpose", {"perm": [1, 2, 0]}, [])], [POSITIONS, CLASSES, "batch"]),
}


def network(path: Path, output: str, batch: int | str = "batch", aux: str | None = None) -> Path:
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y0"], "layer")]
    steps, shape = OUTPUTS[output]
    for number, (op, attributes, more) in enumerate(steps):
        target = "out" if number == len(steps) - 1 else f"y{number + 1}"
        nodes.append(helper.make_node(op, [f"y{number}", *more], [target], **attributes))
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * len(shape))]
    if aux == "mean":
        nodes.append(helper.make_node("ReduceMean", ["y0"], ["aux"], axes=[0, 1, 2], keepdims=0))
    if aux == "constant":
        nodes.append(helper.make_node("Identity", ["w"], ["aux"]))
    if aux == "chosen":
        nodes.append(helper.make_node("NonZero", ["positive"], ["aux"]))
        nodes.insert(-1, helper.make_node("Greater", ["y0", "zero"], ["positive"]))
    if aux:
        dims = {"mean": [], "constant": [WIDTH, CLASSES], "chosen": [3, "found"]}[aux]
        kind = TensorProto.INT64 if aux == "chosen" else TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info("aux", kind, dims))
    tensors = [
        numpy_helper.from_array(rng.standard_normal((WIDTH, CLASSES)).astype("f4"), "w"),
        numpy_helper.from_array(np.array([-1, CLASSES]), "flat_shape"),
        numpy_helper.from_array(np.array(0, "f4"), "zero"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, POSITIONS, WIDTH])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], outputs, tensors),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(model, path / "model.onnx")
    return path / "model.onnx"


def samples(count: int) -> Samples:
    return Samples({"x": np.random.default_rng(1).standard_normal((count, POSITIONS, WIDTH)).astype("f4")})


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("count", [3, EVALUATION_BATCH, EVALUATION_BATCH + 5, 2 * EVALUATION_BATCH])
def test_the_metric_sees_what_one_large_batch_gives(tmp_path: Path, output: str, count: int) -> None:
    path, given, seen = network(tmp_path, output), samples(count), []
    evaluate(path, given, lambda outputs, target: seen.append(outputs["out"]) or 1.0)
    expected = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["out"], given.inputs)[0]
    np.testing.assert_allclose(seen[0], expected, atol=1e-5)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("batch", "count"), [(8, 3), (8, 20), (5, 10), (1, 3)])
def test_of_a_fixed_batch_too(tmp_path: Path, output: str, batch: int, count: int) -> None:
    if batch == 1 and "flat" in output:
        pytest.skip("with one sample in a batch both orders are the same")
    (tmp_path / "open").mkdir()
    given, seen = samples(count), []
    fixed, free = network(tmp_path, output, batch), network(tmp_path / "open", output)
    evaluate(fixed, given, lambda outputs, target: seen.append(outputs["out"]) or 1.0)
    expected = onnxruntime.InferenceSession(free, providers=["CPUExecutionProvider"]).run(["out"], given.inputs)[0]
    np.testing.assert_allclose(seen[0], expected, atol=1e-5)


@pytest.mark.parametrize("aux", ["mean", "chosen"])
def test_outputs_without_samples_are_as_they_are_for_one_batch_and_refused_for_several(
    tmp_path: Path, aux: str
) -> None:
    path = network(tmp_path, "first", aux=aux)
    assert evaluate(path, samples(7), lambda outputs, target: len(outputs["out"])) == 7
    with pytest.raises(RowsError, match="'aux'"):
        evaluate(path, samples(40), lambda outputs, target: 1.0)


def test_an_output_that_is_always_the_same_is_given_once(tmp_path: Path) -> None:
    path = network(tmp_path, "first", aux="constant")
    assert evaluate(path, samples(40), lambda outputs, target: len(outputs["aux"])) == WIDTH


@pytest.mark.parametrize("result", ["good", "0.5", None, 1j, (0.5, 0.6), {"a": 1}, np.ones(2), float("nan"), True])
def test_a_metric_that_is_no_finite_number_is_refused_in_one_line(result: object) -> None:
    with pytest.raises(MetricError, match="one finite number"):
        value_of(lambda outputs, target: result, {"o": np.ones(2)}, None)  # type: ignore[arg-type,return-value]


def test_a_metric_may_change_what_it_gets() -> None:
    outputs, target = {"o": np.ones(3)}, np.ones(3)

    def spoils(outputs, target) -> float:
        outputs["o"][:] = target[:] = 0
        return 0.5

    assert value_of(spoils, outputs, target) == 0.5
    assert outputs["o"].sum() == target.sum() == 3


def test_top1_takes_the_scores_beside_labels_and_says_what_does_not_fit() -> None:
    scores = np.eye(3, dtype="f4")
    assert top1({"label": np.arange(3), "scores": scores}, np.array([0, 1, 1])) == pytest.approx(2 / 3)
    for target in (np.array(["a", "b", "0"]), np.array([0, 1, 3]), np.array([0.5, 1, 2]), np.eye(3)):
        with pytest.raises(MetricError, match="top1"):
            top1({"scores": scores}, target)

"""Every operator against the tests that the `onnx` package ships (inputs and expected outputs by its authors)."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnx_spdy.models import TorchGraph, UnsupportedOperator
from onnx_spdy.models.operators import OPERATORS
from onnx_spdy.models.operators.operator import TORCH_DTYPES, read_tensor

# Cases of operators that we have, by name, that can't pass.
EXCLUDED = {
    r"_training_mode$|^test_training_dropout": "graphs are run as for inference",
    r"^test_resize_tf_crop_and_resize": "crops of TensorFlow's detection networks",
    r"^test_resize_.*antialias": "antialiased resizing is preprocessing, not part of a network",
    r"^test_reduce_(max|min)_empty_set": "PyTorch has no largest element of nothing",
    r"_uint(16|32|64)(_expanded)?$|^test_bitwise_not_3d$": "PyTorch has no arithmetic on wide unsigned integers",
    r"^test_attention_4d_causal_fp16": "half precision, rounded elsewhere: 2 of 192 values 1e-3 apart",
    r"^test_col2im_5d$": "PyTorch folds windows of two spatial axes only",
}
# Operators of the suite that TorchGraph doesn't run.
NOT_CLAIMED = {
    "training, not inference": "Adagrad Adam Momentum NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "results hang on a random generator": "Bernoulli RandomUniformLike",
    "text and files, which PyTorch has no tensors for": (
        "ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer"
    ),
    "control flow and lists of tensors: TorchGraph has no subgraphs": (
        "If Loop Scan OptionalGetElement OptionalHasElement SequenceEmpty SequenceInsert SequenceLength SequenceMap "
        "SplitToSequence"
    ),
    "trees and tables of classical learning (domain ai.onnx.ml)": (
        "ArrayFeatureExtractor Binarizer LabelEncoder TreeEnsemble"
    ),
    "newer than opset 24, written by no exporter yet": ("BitCast CausalConvWithState FlexAttention LinearAttention"),
    "written by no exporter of networks, or not in PyTorch itself": "DeformConv MelWeightMatrix",
}

# What a wrong operator may end in; collected, so that one run shows all.
FAILURES = (AssertionError, RuntimeError, TypeError, ValueError, IndexError)


class Cases:
    """The suite's cases that consist of our operators: those of one operator under its name, the others under ''."""

    def __init__(self) -> None:
        self.by_operator: dict[str, list] = defaultdict(list)
        self.excluded: dict[str, int] = dict.fromkeys(EXCLUDED, 0)
        self.not_claimed: set[str] = set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the suite overflows and divides by zero on purpose
            cases = load_model_tests(kind="node")
        for case in cases:
            used = {node.op_type for node in case.model.graph.node} - {"Constant"}
            self.not_claimed |= used - set(OPERATORS)
            if not used <= set(OPERATORS) or _has_foreign_types(case.model):
                continue
            reason = next((pattern for pattern in EXCLUDED if re.search(pattern, case.name)), None)
            if reason is None:
                self.by_operator[next(iter(used)) if len(used) == 1 else ""].append(case)
            else:
                self.excluded[reason] += 1


def _has_foreign_types(model: onnx.ModelProto) -> bool:
    """Element types that PyTorch doesn't have: text, 8-bit floats, 4-bit integers; sequences and optionals."""
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    types = {value.type.tensor_type.elem_type for value in values}
    types |= {
        item.i for node in model.graph.node for item in node.attribute if (node.op_type, item.name) == ("Cast", "to")
    }
    return bool(types - set(TORCH_DTYPES))


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases()


def as_tensor(value) -> torch.Tensor:
    return read_tensor(value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value)))


def run_case(model: onnx.ModelProto, inputs: list, expected: list, rtol: float, atol: float) -> None:
    graph = TorchGraph(model)
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value)) for value in inputs
    ]
    given = dict(zip(graph.input_names, map(read_tensor, tensors), strict=False))
    with torch.no_grad():
        results = graph(given)
    for value, result in zip(expected, results.values(), strict=True):
        wanted = as_tensor(value)
        assert result.dtype == wanted.dtype
        assert result.shape == wanted.shape
        if wanted.dtype == torch.bfloat16:
            wanted, result, rtol = wanted.float(), result.float(), 2e-2
        np.testing.assert_allclose(result.numpy(), wanted.numpy(), rtol=rtol, atol=max(atol, 1e-6))


def run_all(chosen: list) -> None:
    failures = []
    for case in chosen:
        for inputs, expected in case.data_sets:
            try:
                run_case(case.model, inputs, expected, case.rtol, case.atol)
            except FAILURES as exc:
                failures.append(f"{case.name}: {type(exc).__name__}: {str(exc).strip()[:300]}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_computes_what_the_standard_says(cases, operator):
    chosen = cases.by_operator[operator]
    assert chosen, f"the suite has no case for {operator}"
    run_all(chosen)


def test_graphs_of_several_operators_compute_what_the_standard_says(cases):
    run_all(cases.by_operator[""])


def test_most_of_the_suite_is_run_and_every_exclusion_is_needed(cases):
    run = sum(len(chosen) for chosen in cases.by_operator.values())
    assert run > 1350
    assert [pattern for pattern, count in cases.excluded.items() if not count] == []


def test_every_operator_that_is_left_out_has_its_reason(cases):
    assert cases.not_claimed == {operator for operators in NOT_CLAIMED.values() for operator in operators.split()}


def read_all(folder: Path, what: str) -> list[TensorProto]:
    count = len(list(folder.glob(f"{what}_*.pb")))
    return [TensorProto.FromString((folder / f"{what}_{i}.pb").read_bytes()) for i in range(count)]


@pytest.mark.parametrize("kind", ["pytorch-converted", "pytorch-operator", "simple"])
def test_old_opsets(kind):
    """Networks and operators exported at opset 6: attributes that are inputs today, 2-D softmax, old Clip and Pad."""
    failures, ran = [], 0
    for case in load_model_tests(kind=kind):
        folder = Path(case.model_dir)
        model = onnx.load(folder / "model.onnx")
        try:
            TorchGraph(model)
        except UnsupportedOperator:
            continue
        for data in sorted(folder.glob("test_data_set_*")):
            inputs, expected = (read_all(data, "input"), read_all(data, "output"))
            ran += 1
            try:
                run_case(model, inputs, expected, 1e-3, 1e-5)
            except FAILURES as exc:
                failures.append(f"{case.name}: {type(exc).__name__}: {str(exc).strip()[:300]}")
    assert not failures, "\n".join(failures)
    assert ran >= {"pytorch-converted": 50, "pytorch-operator": 20, "simple": 2}[kind]

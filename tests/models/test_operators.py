"""Every operator against the tests that the `onnx` package ships (inputs and expected outputs by its authors)."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import torch
from onnx import SequenceProto, TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnx_spdy.models import TorchGraph, UnsupportedOperator
from onnx_spdy.models.operators import OPERATORS
from onnx_spdy.models.operators.operator import TORCH_DTYPES, Node, read_tensor

# Cases of operators that we have, by name, that can't pass.
EXCLUDED = {
    r"_training_mode$|^test_training_dropout": "graphs are run as for inference",
    r"^test_resize_tf_crop_and_resize": "crops of TensorFlow's detection networks",
    r"^test_resize_.*antialias": "antialiased resizing is preprocessing, not part of a network",
    r"^test_reduce_(max|min)_empty_set": "PyTorch has no largest element of nothing",
    r"_uint(16|32|64)(_expanded)?$|^test_bitwise_not_3d$": "PyTorch has no arithmetic on wide unsigned integers",
    r"^test_attention_4d_causal_fp16": "half precision, rounded elsewhere: 2 of 192 values 1e-3 apart",
    r"^test_scan_sum$": "Scan as before opset 9",
    r"^test_col2im_5d$": "PyTorch folds windows of two spatial axes only",
}
# Operators of the suite that TorchGraph doesn't run.
NOT_CLAIMED = {
    "training, not inference": "Adagrad Adam Momentum NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "results hang on a random generator": "Bernoulli RandomUniformLike",
    "text and files, which PyTorch has no tensors for": (
        "ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer"
    ),
    "values that may be none, and functions over lists": "OptionalGetElement OptionalHasElement SequenceMap",
    "trees (domain ai.onnx.ml)": "TreeEnsemble",
    "newer than opset 24, written by no exporter yet": ("BitCast CausalConvWithState FlexAttention LinearAttention"),
    "written by no exporter of networks, or not in PyTorch itself": "DeformConv MelWeightMatrix",
}

# Operators that the suite only has in its simple models, or not at all: see the tests below.
NOT_ALONE = {
    "ConcatFromSequence", "LabelEncoder", "Normalizer", "Scaler", "SequenceAt", "SequenceConstruct", "SequenceEmpty",
    "SequenceErase", "SequenceLength",
}  # fmt: skip

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
        if cases[0].model is None:
            pytest.skip("this onnx has the cases of its operators in files")
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
    """Element types that PyTorch doesn't have: text, 8-bit floats, 4-bit integers; optionals."""
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    tensors = [
        value.type.sequence_type.elem_type if value.type.HasField("sequence_type") else value.type for value in values
    ]
    types = {kind.tensor_type.elem_type for kind in tensors}
    types |= {
        item.i for node in model.graph.node for item in node.attribute if (node.op_type, item.name) == ("Cast", "to")
    }
    return bool(types - set(TORCH_DTYPES))


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases()


def as_value(value) -> torch.Tensor | tuple[torch.Tensor, ...]:
    if isinstance(value, SequenceProto):
        value = numpy_helper.to_list(value)
    if isinstance(value, list):
        return tuple(map(as_value, value))
    return read_tensor(value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value)))


def run_case(model: onnx.ModelProto, inputs: list, expected: list, rtol: float, atol: float) -> None:
    graph = TorchGraph(model)
    with torch.no_grad():
        results = graph(dict(zip(graph.input_names, map(as_value, inputs), strict=False)))
    for value, result in zip(expected, results.values(), strict=True):
        compare(result, as_value(value), rtol, atol)


def compare(result, wanted, rtol: float, atol: float) -> None:
    if isinstance(wanted, tuple):
        assert isinstance(result, tuple)
        for one, other in zip(result, wanted, strict=True):
            compare(one, other, rtol, atol)
        return
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


@pytest.mark.parametrize("operator", sorted(set(OPERATORS) - NOT_ALONE))
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


def read_all(folder: Path, what: str, values) -> list:
    """The inputs or outputs of a case on disk; `values` are those that its graph declares."""
    kinds = [SequenceProto if value.type.HasField("sequence_type") else TensorProto for value in values]
    paths = [folder / f"{what}_{i}.pb" for i in range(len(list(folder.glob(f"{what}_*.pb"))))]
    return [kind.FromString(path.read_bytes()) for kind, path in zip(kinds, paths, strict=False)]


LEARNING = [
    ("Scaler", {"offset": [1.0, 2, 3], "scale": [0.5, 2, -1]}),
    ("Scaler", {"offset": [1.0], "scale": [2.0]}),
    *(("Normalizer", {"norm": norm}) for norm in ("MAX", "L1", "L2")),
    ("LabelEncoder", {"keys_floats": [0.0, 1.5], "values_floats": [7.0, 8.0], "default_float": 9.0}),
    ("LabelEncoder", {"keys_floats": [1.5, 0.0], "values_int64s": [3, 4]}),
]


@pytest.mark.parametrize(("op", "options"), LEARNING)
def test_operators_of_scikit_learn_that_the_suite_lacks(op, options):
    x = np.array([[0.5, 1.5, -2], [0, 0, 0], [1.5, 0, 3]], np.float32)
    out = TensorProto.INT64 if "values_int64s" in options else TensorProto.FLOAT
    node = helper.make_node(op, ["x"], ["y"], domain="ai.onnx.ml", **options)
    values = [helper.make_tensor_value_info(*value, ["batch", 3]) for value in (("x", TensorProto.FLOAT), ("y", out))]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    run_case(model, [x], ort.InferenceSession(model.SerializeToString()).run(None, {"x": x}), 1e-5, 1e-6)


def test_lists_of_tensors():
    """Each of their operators in one graph, as ONNX Runtime computes it."""
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 3] x, int64[k] sizes) => (float[m, 3] y, float[2, 3] z, float w, int64 count)
        <int64 one = {1}, int64 two = {2}> {
            parts = SplitToSequence (x, sizes)
            single = SplitToSequence <keepdims = 0> (x)
            minus1 = Neg (one)
            last = SequenceAt (parts, minus1)
            minus2 = Neg (two)
            longer = SequenceInsert (parts, last, one)
            shorter = SequenceErase (longer, minus2)
            y = ConcatFromSequence <axis = 0> (shorter)
            count = SequenceLength (longer)
            a = SequenceAt (single, one)
            b = SequenceAt (single, two)
            both = SequenceConstruct (a, b)
            z = ConcatFromSequence <axis = 0, new_axis = 1> (both)
            none = SequenceEmpty ()
            three = SequenceInsert (none, a)
            c = SequenceAt (three, minus1)
            w = ReduceSum <keepdims = 0> (c)
        }""")
    given = {"x": np.arange(18, dtype=np.float32).reshape(6, 3), "sizes": np.array([1, 3, 2])}
    run_case(model, list(given.values()), ort.InferenceSession(model.SerializeToString()).run(None, given), 1e-5, 1e-6)


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
            inputs, expected = (
                read_all(data, "input", model.graph.input),
                read_all(data, "output", model.graph.output),
            )
            ran += 1
            try:
                run_case(model, inputs, expected, 1e-3, 1e-5)
            except FAILURES as exc:
                failures.append(f"{case.name}: {type(exc).__name__}: {str(exc).strip()[:300]}")
    assert not failures, "\n".join(failures)
    assert ran >= {"pytorch-converted": 50, "pytorch-operator": 20, "simple": 8}[kind]


def test_the_smallest_float_of_a_mask_stays_finite_in_bfloat16():
    smallest = torch.tensor(torch.finfo(torch.float32).min)
    scores = torch.ones(2, 3, dtype=torch.bfloat16)
    where, largest = (OPERATORS[name].build(Node(name, "n", 18, (), ("y",), {})) for name in ("Where", "Max"))
    assert where(torch.zeros(2, 3, dtype=torch.bool), scores, smallest).isfinite().all()
    assert largest(torch.full((2, 3), -torch.inf, dtype=torch.bfloat16), smallest).isfinite().all()


def test_a_row_that_is_masked_wholly_leaves_other_gradients_alone():
    softmax = OPERATORS["Softmax"].build(Node("Softmax", "n", 18, ("x",), ("y",), {}))
    scores = torch.tensor([[1.0, 2.0], [-torch.inf, -torch.inf]], requires_grad=True)
    values = torch.ones(2, 1, requires_grad=True)
    (softmax(scores) @ values)[0].backward()
    assert values.grad.isfinite().all()
    assert softmax(scores.detach())[1].isnan().all()  # as in ONNX Runtime

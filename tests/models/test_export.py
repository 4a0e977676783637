"""PyTorch modules become graphs with known names, an open batch and the same results."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from onnx_spdy.models import ModelError, export_module, find_layers, input_shapes, prepare


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Dropout()
        self.fc = nn.Linear(16, 4)
        self.bn.running_mean.uniform_(-1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(ids)
        return y * mask, y


class Impossible(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@pytest.fixture(scope="module")
def block() -> tuple[Block, onnx.ModelProto]:
    torch.manual_seed(0)
    module = Block()
    module.bn.eval()  # a mixture of modes, as a user may have it
    return module, export_module(module, (torch.randn(1, 3, 8, 8),))


def test_names_and_open_batch(block):
    _, model = block
    assert input_shapes(model) == {"input": (None, 3, 8, 8)}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [value.name for value in model.graph.output] == ["output"]
    assert {"conv.weight", "fc.weight", "fc.bias"} <= {tensor.name for tensor in model.graph.initializer}
    assert model.ir_version <= 10 and model.opset_import[0].version == 18
    onnx.checker.check_model(model, full_check=True)


def test_prunable_layers_keep_the_names_of_the_parameters(block):
    layers = find_layers(prepare(block[1]).proto, minimum_weights=1)
    assert [layer.weight for layer in layers] == ["conv.weight", "fc.weight"]


def test_results_are_those_of_eval_mode_at_another_batch(block):
    module, model = block
    x = torch.randn(3, 3, 8, 8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = Block.forward(module.eval(), x)
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_training_modes_are_restored():
    module = Block()
    module.bn.eval()
    export_module(module, torch.randn(2, 3, 8, 8))
    assert module.training and module.drop.training and not module.bn.training


@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs_and_outputs(by_name):
    example = {"ids": torch.randn(2, 8), "mask": torch.ones(2, 4)}
    model = export_module(Pair(), example if by_name else tuple(example.values()))
    assert input_shapes(model) == {"ids": (None, 8), "mask": (None, 4)}
    assert [value.name for value in model.graph.output] == ["output_0", "output_1"]


def test_a_module_that_cannot_be_exported_is_one_line():
    module = Impossible()
    with pytest.raises(ModelError) as error:
        export_module(module, torch.ones(2, 3))
    message = str(error.value)
    assert "Impossible" in message and "\n" not in message and len(message) < 500
    assert module.training


def test_nothing_is_printed():
    """In a process of its own: PyTorch's loggers keep the stderr that they started with."""
    program = """if True:
        import torch
        from onnx_spdy.models import ModelError, export_module
        class Impossible(torch.nn.Module):
            def forward(self, x):
                return x * 2 if float(x.sum()) > 0 else x
        export_module(torch.nn.Linear(8, 4), torch.ones(1, 8))
        try:
            export_module(Impossible(), torch.ones(2, 3))
        except ModelError:
            pass
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_values_inside_the_graph_make_room_for_the_names():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) * self.output

    model = export_module(Named(), torch.randn(2, 3))
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(["output"], {"input": -np.ones((5, 3), np.float32)})[0].tolist() == [[0.0] * 3] * 5


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.fc = nn.Embedding(20, 16), nn.Linear(16, 24)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(self.tokens(ids)) * mask[..., None]
        return hidden.sum(1) / mask.sum(1, keepdim=True)


def test_more_axes_can_be_open_and_linear_layers_keep_their_names():
    module = Masked()
    inputs = {"ids": torch.randint(0, 20, (2, 7)), "mask": torch.ones(2, 7)}
    model = prepare(export_module(module, inputs, {"ids": {1: "sequence"}, "mask": {1: "sequence"}})).proto
    for value in model.graph.input:
        assert [dim.dim_param for dim in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
    assert [layer.weight for layer in find_layers(model)] == ["fc.weight.T"]
    longer = {"ids": np.random.default_rng(0).integers(0, 20, (3, 11)), "mask": np.ones((3, 11), np.float32)}
    (got,) = ort.InferenceSession(model.SerializeToString()).run(None, longer)
    expected = module(**{name: torch.from_numpy(array) for name, array in longer.items()})
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("axes", [{"nothing": {1: "a"}}, {"ids": {2: "a"}}])
def test_open_axes_of_nothing_are_refused(axes):
    inputs = {"ids": torch.randint(0, 20, (2, 7)), "mask": torch.ones(2, 7)}
    with pytest.raises(ModelError, match="open ax"):
        export_module(Masked(), inputs, axes)


def test_one_tensor_given_for_two_arguments_stays_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return one - other

    example = torch.ones(2, 3)
    model = export_module(Difference(), {"one": example, "other": example})
    inputs = {name: np.full((4, 3), value, np.float32) for name, value in (("one", 3), ("other", 1))}
    np.testing.assert_array_equal(ort.InferenceSession(model.SerializeToString()).run(None, inputs)[0], 2)

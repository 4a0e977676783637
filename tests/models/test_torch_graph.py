"""TorchGraph against ONNX Runtime, and what PyTorch code expects of a module."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch import nn

from onnx_spdy.models import ModelError, TorchGraph, UnsupportedOperator, export_module, load_model, prepare

TOLERANCE = 1e-4  # of the largest absolute output


def oracle(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def assert_close(results: dict[str, torch.Tensor], expected: dict[str, np.ndarray], tolerance=TOLERANCE) -> None:
    assert list(results) == list(expected)
    for name, wanted in expected.items():
        got = results[name].detach().float().numpy()
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


def agrees(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        results = TorchGraph(model)({name: torch.from_numpy(array) for name, array in inputs.items()})
    assert_close(results, oracle(model, inputs))


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("file", "shape"),
    [("resnet20_cifar10", (3, 3, 32, 32)), ("dscnn_kws", (3, 1, 49, 10)), ("mobilenet_v2_ilsvrc", (2, 3, 224, 224))],
)
def test_real_networks_agree_with_onnx_runtime(real_file, file, shape, prepared):
    model = load_model(real_file(f"{file}.onnx"))
    agrees(prepare(model).proto if prepared else model, {"input": images(*shape)})


def test_a_real_detector_agrees_with_onnx_runtime(real_file):
    # Pixels as it was trained on: near zero its results hang on the last bits in any runtime.
    pixels = np.random.default_rng(1).uniform(0, 255, (1, 3, 416, 416)).astype(np.float32)
    agrees(load_model(real_file("yolox_nano_coco.onnx")), {"images": pixels})


def test_a_real_pytorch_network_agrees_with_itself(real_networks):
    module, (example,) = real_networks.resnet18_imagenette()
    graph = TorchGraph(prepare(export_module(module, (example,))).proto)
    batch = torch.from_numpy(images(2, 3, 160, 160))
    with torch.no_grad():
        assert_close(graph({"input": batch}), {"output": module(batch).numpy()})


def test_a_suspended_run_goes_on_to_the_same_outputs_with_other_weights_from_there_on():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    graph = TorchGraph(prepare(export_module(module.eval(), (torch.zeros(2, 3, 8, 8),))).proto)
    inputs = {name: torch.from_numpy(images(2, 3, 8, 8)) for name in graph.input_names}
    steps = range(1, graph.step_of([step.module.node.name for step in graph._steps][-1]) + 1)
    kept = []
    with torch.no_grad():
        whole = graph.run(inputs, keep=kept.append, keep_before=steps)
        assert [one.step for one in kept] == list(steps)
        assert all(one.bytes > 0 for one in kept)
        for one in kept:
            again = graph.run(inputs, one)
            assert all(torch.equal(again[name], whole[name]) for name in whole)
        next(parameter for parameter in graph.parameters() if parameter.shape == (8, 3, 3, 3)).zero_()
        changed = graph(inputs)
        assert not any(torch.equal(changed[name], whole[name]) for name in whole)
        late = graph.run(inputs, kept[-1])  # the first convolution isn't looked at again
        assert all(torch.equal(late[name], whole[name]) for name in whole)


class Encoder(nn.Module):
    """Embedding, positions made from the shape, masked attention, GELU: shape arithmetic and scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.attention = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu", dropout=0.1)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        query = x.reshape(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)
        scores = (query @ query.transpose(-1, -2) / 8**0.5).masked_fill(mask[:, None, None, :] == 0, -1e9)
        x = x + (scores.softmax(-1) @ query).transpose(1, 2).reshape(x.shape)
        return self.head(self.attention(x).mean(1))


class Segmenter(nn.Module):
    """Strided, dilated, grouped and transposed convolutions, unfolded norms, pooling, up-sampling, Concat, Pad."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.norm, self.groups = nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(4, 8)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1)
        self.head = nn.Conv2d(24, 4, 1)
        self.slope = nn.PReLU(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.groups(self.norm(nn.functional.leaky_relu(self.dilated(self.stem(x)))))
        small = self.pool(x)
        wide = [
            self.up(small),
            nn.functional.interpolate(small, scale_factor=2, mode="bilinear"),
            nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2, mode="nearest"),
        ]
        padded = nn.functional.pad(self.slope(self.head(torch.cat(wide, 1))), (1, 2, 0, 1), mode="reflect")
        a, b = padded.clamp(-1, 1).chunk(2, 1)
        return torch.cat(
            [a * torch.sigmoid(b), nn.functional.pixel_shuffle(padded, 2).mean((2, 3), keepdim=True) + a], 1
        )


class Signals(nn.Module):
    """1-D convolutions, max over time, a linear layer over several axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(4, 8, 5, padding=2), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(nn.functional.max_pool1d(self.conv(x), 2)).transpose(1, 2)
        return self.fc(self.norm(y)).log_softmax(-1)


NETWORKS = {
    "encoder": (Encoder, {"ids": torch.randint(0, 50, (2, 7)), "mask": torch.ones(2, 7, dtype=torch.int64)}),
    "segmenter": (Segmenter, {"input": torch.randn(2, 3, 32, 32)}),
    "signals": (Signals, {"input": torch.randn(2, 4, 16)}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exported_networks_agree_with_onnx_runtime(name):
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model = export_module(make(), tuple(inputs.values()))
    arrays = {key: value.numpy() for key, value in inputs.items()}
    agrees(model, arrays)
    agrees(prepare(model).proto, arrays)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_older_exporter_agree_with_onnx_runtime(name, tmp_path):
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    with warnings.catch_warnings():  # it announces its own deprecation, and traces Python numbers
        warnings.simplefilter("ignore")
        torch.onnx.export(
            make().eval(),
            tuple(inputs.values()),
            str(tmp_path / "model.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=list(inputs),
            dynamic_axes={key: {0: "batch"} for key in inputs},
        )
    model = load_model(tmp_path / "model.onnx")
    arrays = {key: value.numpy() for key, value in inputs.items()}
    agrees(model, arrays)
    agrees(prepare(model).proto, arrays)


def test_parameters_have_the_names_of_the_initializers(small_cnn):
    graph = TorchGraph(small_cnn)
    names = [tensor.name for tensor in small_cnn.graph.initializer]
    assert sorted(name for name, _ in graph.named_parameters()) == sorted(names)
    assert sorted(graph.state_dict()) == sorted(names)


def test_a_state_dict_can_be_loaded(small_cnn):
    graph, other = TorchGraph(small_cnn), TorchGraph(small_cnn)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(graph.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(graph.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"fc\.wrong"):
        other.load_state_dict({**graph.state_dict(), "fc.wrong": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        other.load_state_dict({k: v for k, v in graph.state_dict().items() if k != "fc.bias"})


def test_running_statistics_and_bounds_are_no_parameters(build):
    numbers = dict.fromkeys(("scale", "shift", "mean", "var"), np.ones(4, np.float32))
    nodes = [
        helper.make_node("BatchNormalization", ["x", "scale", "shift", "mean", "var"], ["b"]),
        helper.make_node("Clip", ["b", "low", "high"], ["y"]),
    ]
    bounds = {"low": np.float32(0), "high": np.float32(6)}
    graph = TorchGraph(build(nodes, {"x": [1, 4, 2, 2]}, {"y": [1, 4, 2, 2]}, {**numbers, **bounds}))
    assert {name for name, _ in graph.named_parameters()} == {"scale", "shift"}
    assert {name for name, _ in graph.named_buffers()} == {"mean", "var"}


def test_the_model_and_the_graph_share_no_memory(small_cnn):
    before = small_cnn.SerializeToString()
    with torch.no_grad():
        for parameter in TorchGraph(small_cnn).parameters():
            parameter.fill_(7)
    assert small_cnn.SerializeToString() == before


def test_hooks_see_the_inputs_of_a_layer_and_can_replace_its_output(small_cnn):
    graph = TorchGraph(small_cnn)
    seen = []
    handle = graph.node("fc").register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    x = torch.from_numpy(images(2, 3, 8, 8))
    plain = graph({"input": x})["logits"]
    (features, weight, bias), parameters = seen[0], dict(graph.named_parameters())
    assert weight is parameters["fc.weight"] and bias is parameters["fc.bias"]
    assert torch.allclose(features @ weight.T + bias, plain, atol=1e-5)
    handle.remove()
    replaced = graph.node("conv1").register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    # ReLU(0) -> depthwise convolution without bias -> 0: only the last bias is left.
    assert torch.allclose(graph({"input": x})["logits"], parameters["fc.bias"].expand(2, -1))
    replaced.remove()
    assert torch.equal(graph({"input": x})["logits"], plain)


def test_an_unknown_node_is_an_error(small_cnn):
    with pytest.raises(ModelError, match="no node 'conv9'"):
        TorchGraph(small_cnn).node("conv9")


def test_gradients_agree_with_differences(small_cnn):
    graph = TorchGraph(small_cnn).double()
    x = torch.from_numpy(images(2, 3, 8, 8)).double()

    def loss() -> torch.Tensor:
        return graph({"input": x})["logits"].square().sum()

    loss().backward()
    for name, parameter in graph.named_parameters():
        assert parameter.grad is not None
        flat, step = parameter.data.view(-1), 1e-6
        middle = flat[3].item()
        values = []
        for value in (middle - step, middle + step):
            flat[3] = value
            values.append(loss().item())
        flat[3] = middle
        slope = (values[1] - values[0]) / (2 * step)
        assert parameter.grad.view(-1)[3].item() == pytest.approx(slope, rel=1e-4, abs=1e-4), name


def test_a_deep_copy_is_independent(small_cnn):
    graph = TorchGraph(small_cnn)
    other = copy.deepcopy(graph)
    x = {"input": torch.from_numpy(images(1, 3, 8, 8))}
    assert torch.equal(graph(x)["logits"], other(x)["logits"])
    with torch.no_grad():
        dict(other.named_parameters())["fc.bias"].add_(1)
    assert torch.allclose(graph(x)["logits"] + 1, other(x)["logits"])
    calls = []
    other.node("fc").register_forward_hook(lambda *arguments: calls.append(1))
    graph(x)
    assert not calls


def test_channels_last_goes_through_the_whole_network(small_cnn):
    graph = TorchGraph(small_cnn).to(memory_format=torch.channels_last)
    layouts = []
    for name in ("conv1", "relu1", "dw"):
        graph.node(name).register_forward_hook(
            lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    x = images(2, 3, 8, 8)
    assert_close(graph({"input": torch.from_numpy(x)}), oracle(small_cnn, {"input": x}))
    assert layouts == [True, True, True]


def test_autocast_computes_in_bfloat16(small_cnn):
    graph = TorchGraph(small_cnn)
    types = []
    graph.node("conv1").register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    x = images(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = graph({"input": torch.from_numpy(x)})
    assert types == [torch.bfloat16]
    assert_close(results, oracle(small_cnn, {"input": x}), tolerance=3e-2)


def test_values_are_freed_after_their_last_use(small_cnn):
    import weakref

    graph = TorchGraph(small_cnn)
    alive: list = []
    for name in ("conv1", "relu1", "dw"):
        graph.node(name).register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(output)))
    found = []
    graph.node("fc").register_forward_pre_hook(lambda *arguments: found.extend(ref() for ref in alive))
    with torch.no_grad():
        graph({"input": torch.from_numpy(images(1, 3, 8, 8))})
    assert found == [None, None, None]


def test_several_outputs_have_their_names(build):
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], "split", axis=1, num_outputs=2),
        helper.make_node("Relu", ["b"], ["c"]),
    ]
    model = build(nodes, {"x": [2, 5]}, {"c": [2, 2], "a": [2, 3], "x": [2, 5]})
    agrees(model, {"x": images(2, 5)})


@pytest.mark.parametrize("inputs", [{}, {"x": torch.zeros(1)}, {"input": torch.zeros(1), "target": torch.zeros(1)}])
def test_wrong_inputs_are_named(small_cnn, inputs):
    with pytest.raises(ModelError, match=r"inputs are \['input'\]"):
        TorchGraph(small_cnn)(inputs)


def test_all_missing_operators_are_named_at_once(build):
    nodes = [
        helper.make_node("Bernoulli", ["x"], ["d"], "first"),
        helper.make_node("RandomUniformLike", ["x"], ["n"], "second"),
        helper.make_node("RNN", ["x", "x", "x"], ["p"], "third", hidden_size=4, activations=["Sine"]),
    ]
    model = build(nodes, {"x": [1, 4, 4]}, {"d": [1, 4, 4], "n": [1, 4, 4], "p": [1, 1, 4, 4]})
    with pytest.raises(UnsupportedOperator) as error:
        TorchGraph(model)
    message = str(error.value)
    for part in (
        "Bernoulli (node 'first')",
        "RandomUniformLike (node 'second')",
        "'third'",
        "models/operators",
        "OPERATORS",
    ):
        assert part in message
    assert "\n" not in message


def test_operators_of_other_domains_are_named_with_their_domain(build):
    node = helper.make_node("Gelu", ["x"], ["y"], "gelu", domain="com.microsoft")
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]})
    model.graph.node[0].CopyFrom(node)
    with pytest.raises(UnsupportedOperator, match=r"com\.microsoft\.Gelu"):
        TorchGraph(model)


def test_shape_arithmetic_stays_on_the_cpu(build):
    """On the `meta` device nothing can be read, so a run proves that no shape was ever moved there."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axis"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["r"]),
        helper.make_node("Shape", ["r"], ["s2"]),
        helper.make_node("ConstantOfShape", ["s2"], ["zeros"]),
        helper.make_node("Add", ["r", "zeros"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    initializers = {
        "zero": np.int64(0),
        "axis": np.array([0]),
        "rest": np.array([-1]),
        "w": np.ones((12, 3), np.float32),
    }
    model = build(nodes, {"x": ["n", 3, 4]}, {"y": ["n", 3]}, initializers)
    agrees(model, {"x": images(2, 3, 4)})
    graph = TorchGraph(model).to("meta")
    assert graph({"x": torch.empty(2, 3, 4, device="meta")})["y"].shape == (2, 3)

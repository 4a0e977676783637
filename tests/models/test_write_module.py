"""Pruned weights come back into the PyTorch module: transposed, folded, tied."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from onnx_spdy.models import (
    ModelError,
    Prepared,
    export_module,
    find_layers,
    narrowed,
    prepare,
    write_module,
    write_weights,
)


class Network(nn.Module):
    """A convolution with a norm that is folded into it, a plain one, and a linear layer over a sequence."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, bias=bias), nn.BatchNorm2d(16)
        self.plain, self.fc = nn.Conv2d(16, 20, 1), nn.Linear(20, 24)
        for values in (self.norm.weight, self.norm.running_var):
            nn.init.uniform_(values, 0.5, 2)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.plain(torch.relu(self.norm(self.conv(x))))).flatten(2).transpose(1, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) @ self.tokens.weight.t()


def half_of_it(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every other weight of each prunable layer zero, and its biases moved."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {}
    for layer in find_layers(model):
        if layer.prunable:
            weights[layer.weight] = stored[layer.weight] * (np.arange(stored[layer.weight].size) % 2).reshape(
                stored[layer.weight].shape
            )
            if layer.bias:
                weights[layer.bias] = stored[layer.bias] + 0.25
    return write_weights(model, weights)


@pytest.mark.parametrize("bias", [False, True])
def test_the_module_computes_what_the_pruned_file_computes(bias):
    torch.manual_seed(0)
    module = Network(bias).eval()
    x = torch.randn(2, 3, 8, 8)
    dense = prepare(export_module(module, (x,))).proto
    pruned = half_of_it(dense)
    changed = write_module(module, dense, pruned)
    assert {"conv.weight", "plain.weight", "plain.bias", "fc.weight", "fc.bias"} <= set(changed)
    expected = ort.InferenceSession(pruned.SerializeToString()).run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(module(x).detach().numpy(), expected, atol=1e-5 * np.abs(expected).max())
    for part in (module.conv, module.plain, module.fc):
        assert (part.weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_a_tied_weight_is_refused_and_the_module_stays():
    module = Tied()
    dense = prepare(export_module(module, (torch.randint(0, 40, (2, 6)),))).proto
    before = module.tokens.weight.clone()
    assert [layer.skip for layer in find_layers(dense)] == [None]
    with pytest.raises(ModelError, match=r"tokens\.weight.*untie"):
        write_module(module, dense, half_of_it(dense))
    assert torch.equal(module.tokens.weight, before)


def test_another_module_is_refused():
    torch.manual_seed(0)
    dense = prepare(export_module(Network(True), (torch.randn(2, 3, 8, 8),))).proto
    torch.manual_seed(1)
    with pytest.raises(ModelError, match="no parameter of Network"):
        write_module(Network(True), dense, half_of_it(dense))


class Levels(nn.Module):
    """One convolution on two levels, each with a norm of its own, which the export folds into two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norms[0](self.shared(x)), self.norms[1](self.shared(x[:, :, ::2, ::2]))


def test_a_convolution_with_several_norms_is_refused_and_the_module_stays():
    torch.manual_seed(0)
    module = Levels().eval()
    dense = prepare(export_module(module, (torch.randn(2, 3, 8, 8),))).proto
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in dense.graph.initializer}
    before = module.shared.weight.clone()
    convolutions = [name for name, values in stored.items() if values.ndim == 4]
    assert len(convolutions) == 2
    for name in convolutions:
        pruned = write_weights(dense, {name: stored[name] * (np.arange(stored[name].size) % 2).reshape(16, 3, 3, 3)})
        with pytest.raises(ModelError, match=r"shared\.weight.*own layer"):
            write_module(module, dense, pruned)
    assert torch.equal(module.shared.weight, before)


def test_a_weight_that_is_computed_from_parameters_is_refused():
    torch.manual_seed(0)
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))).eval()
    dense = prepare(export_module(module, (torch.randn(2, 32),))).proto
    with pytest.raises(ModelError, match="remove the parametrisation first"):
        write_module(module, dense, half_of_it(dense))


def test_a_narrower_network_does_not_fit_the_module_which_stays():
    torch.manual_seed(0)
    module = Network(bias=True).eval()
    dense = prepare(export_module(module, (torch.randn(2, 3, 8, 8),))).proto
    group = next(one for one in Prepared(dense).groups if one.prunable)
    before = {name: values.clone() for name, values in module.state_dict().items()}
    with pytest.raises(ModelError, match="in the narrow network"):
        write_module(module, dense, narrowed(dense, {group.name: range(group.units // 2)}))
    assert all(torch.equal(values, before[name]) for name, values in module.state_dict().items())


def test_a_network_without_a_branch_does_not_fit_the_module_either():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.outer(self.inner(x).relu()))

    dense = prepare(export_module(Block().eval(), (torch.randn(2, 3, 8, 8),))).proto
    (group,) = (one for one in Prepared(dense).groups if one.branch is not None)
    with pytest.raises(ModelError, match="is gone in the narrow network"):
        write_module(Block(), dense, narrowed(dense, {group.name: ()}))

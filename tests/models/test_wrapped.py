"""Modules in the wrappers in which people have them are exported like the module itself, or refused in one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from onnx_spdy.models import ModelError, export_module, find_layers, prepare

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return function(*arguments)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "traced": lambda module: quietly(torch.jit.trace, module, X),
    "scripted": lambda module: quietly(torch.jit.script, module),
    "parallel": nn.DataParallel,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "compiled and parallel": lambda module: torch.compile(nn.DataParallel(module), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_module_is_exported_like_the_module_itself(wrapper: str) -> None:
    module = Network().eval()
    model = prepare(export_module(WRAPPERS[wrapper](module), (X[:2],))).proto
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": X.numpy()})[0]
    np.testing.assert_allclose(found, module(X).detach().numpy(), atol=1e-5)
    assert {layer.weight for layer in find_layers(model)} == {"up.weight", "down.weight"}


def test_torchscript_from_a_file_and_example_arrays_are_taken(tmp_path: Path) -> None:
    module = Network().eval()
    quietly(torch.jit.save, quietly(torch.jit.trace, module, X), tmp_path / "net.pt")
    loaded = quietly(torch.jit.load, tmp_path / "net.pt")
    for given, example in ((loaded, X[:2].numpy()), (module, {"x": X[:2].numpy()}), (module, [X[:2].numpy()])):
        model = prepare(export_module(given, example)).proto  # type: ignore[arg-type]
        found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": X.numpy()})[0]
        np.testing.assert_allclose(found, module(X).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Network().state_dict(), "load_state_dict"),
        (lambda: torch.export.export(Network(), (X,)), "exported program"),
        (lambda: torch.export.export(Network(), (X,)).module(), "exported program"),
        (lambda: Network, "is a class"),
        (lambda: "net.pt", "no torch.nn.Module"),
        (lambda: lambda x: x, "no torch.nn.Module"),
        (lambda: Network().to("meta"), "meta device"),
    ],
)
def test_what_is_no_module_is_refused_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        export_module(make(), X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inputs", [None, "x", 3])
def test_example_inputs_that_are_none_are_refused_in_one_line(inputs: Any) -> None:
    with pytest.raises(ModelError, match=f"example inputs are {type(inputs).__name__}"):
        export_module(Network(), inputs)

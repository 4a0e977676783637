"""Put pruned weights into the PyTorch module that the graph was exported from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from onnx_spdy.models.graph import ModelError
from onnx_spdy.models.parametrised import parametrisation_of
from onnx_spdy.models.write_back import changed_initializers

TOLERANCE = 1e-4  # of a folded weight's largest value: folding rounds each product once
INSTEAD = "run or train the narrow network itself: TorchGraph(load_model(FILE)) is a module too"
BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class _Home:
    """The parameter behind an initializer: stored = (parameter * scale for each output), transposed or not."""

    name: str
    transposed: bool
    scale: Tensor | None = None  # (out,); where a BatchNormalization was folded into the layer


def write_module(module: nn.Module, dense: onnx.ModelProto, pruned: onnx.ModelProto) -> list[str]:
    """Change the module's parameters as `pruned` differs from `dense`; zeros stay exact zeros.

    Parameters are found by their values, so it doesn't matter how the exporter named or transposed them. Where a
    BatchNormalization was folded into a convolution, the convolution's weights are divided by its scale again, and a
    corrected bias goes to the convolution's bias or to the BatchNormalization's.

    Args:
        module: with the dense weights that the graph was exported with.
        dense: the graph in `dense.onnx` of a run on this module, or the `proto` of what `prepare` returns.
        pruned: the graph in `model.onnx` of that run.
    Returns:
        Names of the parameters that were changed.
    Raises:
        ModelError: a changed weight belongs to no parameter, or to one that is used in another place of the graph,
            where it wasn't pruned (tied weights, or one convolution with several BatchNormalizations); or a parameter
            is only a part of a weight (a parametrisation); or the pruned graph is narrower, or lacks residual branches.
            The module is left as it was.
    """
    kept = {name for node in pruned.graph.node for name in node.output}
    if gone := [node.name for node in dense.graph.node if kept.isdisjoint(node.output)]:
        raise ModelError(
            f"node '{gone[0]}' is gone in the narrow network, and the module would compute it still; {INSTEAD}"
        )
    old, new = _arrays(dense), _arrays(pruned)
    changed = changed_initializers(dense, pruned)
    for name in changed:
        if old[name].shape != new[name].shape:
            raise ModelError(
                f"'{name}' is {tuple(new[name].shape)} in the narrow network and {tuple(old[name].shape)} in the "
                f"module, which can't hold it; {INSTEAD}"
            )
    parameters = dict(module.named_parameters())
    homes = {name: home for name in old if (home := _home(name, old[name], parameters)) is not None}
    tied = _tied(homes, changed)
    updates: dict[str, Tensor] = {}
    biases = []
    for name in changed:
        if name in tied:
            raise ModelError(
                f"'{name}' was pruned, but its parameter '{tied[name]}' is also used elsewhere in the graph, where it "
                "was not, or not in the same way: untie the weights (or give each its own layer) before the export"
            )
        if name not in homes:
            biases.append(name)
            continue
        home, values = homes[name], new[name]
        if (whole := parametrisation_of(module, home.name)) is not None:
            raise ModelError(
                f"'{name}' was pruned, but the module computes '{whole}' from '{home.name}': remove the "
                "parametrisation first (torch.nn.utils.parametrize.remove_parametrizations) and export again"
            )
        values = values.T if home.transposed else values
        if home.scale is not None:
            values = values / home.scale.reshape(-1, *[1] * (values.dim() - 1))
        updates[home.name] = values
    biased = [node for node in dense.graph.node if node.op_type in ("Conv", "Gemm") and len(node.input) > 2]
    layers = {node.input[2]: node.input[1] for node in biased}
    for name in biases:
        target, difference = _home_of_bias(name, new[name] - old[name], layers, homes, module)
        updates[target] = parameters[target].detach().cpu() + difference
    with torch.no_grad():
        for name, values in updates.items():
            parameters[name].copy_(values)
    return sorted(updates)


def _arrays(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The floating initializers with values, in double precision."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    return {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float64))
        for tensor in model.graph.initializer
        if tensor.data_type in kinds and tensor.dims
    }


def _home(name: str, values: Tensor, parameters: Mapping[str, Tensor]) -> _Home | None:
    own = parameters.get(name)
    if own is not None and own.shape == values.shape:
        own = own.detach().cpu().double()
        return _Home(name, False) if torch.equal(own, values) else _folded(name, own, values)
    for other, transposed in _alike(values, parameters):
        return _Home(other, transposed)
    if values[0].numel() < 2:  # one number is a multiple of any other
        return None
    for other, parameter in parameters.items():
        if other != name and parameter.shape == values.shape and parameter.is_floating_point():
            home = _folded(other, parameter.detach().cpu().double(), values)
            if home is not None:
                return home
    return None


def _alike(values: Tensor, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, bool]]:
    for name, parameter in parameters.items():
        if parameter.numel() != values.numel() or not parameter.is_floating_point():
            continue
        array = parameter.detach().cpu().double()
        if array.shape == values.shape and torch.equal(array, values):
            yield name, False
        elif array.dim() == 2 and array.T.shape == values.shape and torch.equal(array.T, values):
            yield name, True


def _folded(name: str, own: Tensor, values: Tensor) -> _Home | None:
    """The scale of each output with which the parameter became these values, if there is one."""
    rows, folded = own.flatten(1) if own.dim() > 1 else own[:, None], values.reshape(len(values), -1)
    largest = rows.abs().argmax(1, keepdim=True)
    scale = folded.gather(1, largest) / rows.gather(1, largest)
    if own.dim() < 2 or not torch.isfinite(scale).all() or (scale == 0).any():
        return None
    close = (rows * scale - folded).abs().max() <= TOLERANCE * folded.abs().max()
    return _Home(name, False, scale[:, 0]) if close else None


def _tied(homes: Mapping[str, _Home], changed: list[str]) -> dict[str, str]:
    """Changed initializers whose parameter is behind another initializer too -> that parameter."""
    users: dict[str, list[str]] = {}
    for name, home in homes.items():
        users.setdefault(home.name, []).append(name)
    return {name: homes[name].name for name in changed if name in homes and len(users[homes[name].name]) > 1}


def _home_of_bias(
    name: str, difference: Tensor, layers: Mapping[str, str], homes: Mapping[str, _Home], module: nn.Module
) -> tuple[str, Tensor]:
    """The parameter that takes a correction of a folded bias, and what is added to it."""
    home = homes.get(layers.get(name, ""))
    if home is not None and home.scale is not None:
        parameters = dict(module.named_parameters())
        bias = home.name.removesuffix("weight") + "bias"
        if bias in parameters:
            return bias, difference / home.scale
        for path, part in module.named_modules():
            if isinstance(part, BatchNorm) and part.affine and part.running_var is not None:
                own = (part.weight / torch.sqrt(part.running_var + part.eps)).detach().cpu().double()
                if own.shape == home.scale.shape and torch.allclose(own, home.scale, rtol=TOLERANCE, atol=0):
                    return f"{path}.bias", difference
    raise ModelError(f"'{name}' was changed, but no parameter of {type(module).__name__} belongs to it")

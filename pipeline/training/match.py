"""Match: which parameter of a user's PyTorch module is which layer of the ONNX network.

Exporters keep most names, but not all: the weight of a linear layer on sequences is stored transposed under a
made-up name, and wrappers add a prefix. What the name doesn't tell, the values do. Where a BatchNorm was folded into
the layer, each output channel is scaled, so values are compared up to one factor for each output channel; a
mask speaks of positions only, and that factor changes none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import nn

from onnx_spdy.models import Layer, find_layers, to_canonical
from onnx_spdy.models.parametrised import parametrisation_of
from onnx_spdy.runtimes.errors import OnnxSpdyError

TOLERANCE = 1e-4  # 1 - cosine of two rows that are called equal up to a factor


class ParameterMismatch(OnnxSpdyError, ValueError):
    """A layer of the network can't be found, or not for certain, among the parameters of the module."""


@dataclass(frozen=True)
class ModuleWeight:
    """A parameter of a module that is the weight of a layer.

    Attributes:
        name: in `module.named_parameters()`.
        transposed: the module stores it as (in, out) and the layer is (out, in).
    """

    name: str
    transposed: bool

    def canonical(self, values: torch.Tensor) -> torch.Tensor:
        """The parameter's values as (out, in, *kernel); a view."""
        return values.T if self.transposed else values


def match_weights(
    module: nn.Module, model: onnx.ModelProto, layers: Iterable[str], names: Mapping[str, str] | None = None
) -> dict[str, ModuleWeight]:
    """Find the weights of layers in a module.

    Args:
        module: the one that was exported, or one with the same parameters.
        model: the network made from it, with its dense weights.
        layers: names of the model's layers to look for.
        names: layer -> parameter name, for those that you know better; they are only checked for their shape.
    Returns:
        layer name -> its parameter, all different.
    Raises:
        ParameterMismatch: a layer has no match, several equally good ones, or shares one with another layer (one
            convolution with several BatchNorms is several layers); or its parameter is only a part of a weight.
    """
    known = {layer.name: layer for layer in find_layers(model)}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    parameters = dict(module.named_parameters())
    found: dict[str, ModuleWeight] = {}
    for name in layers:
        if name not in known:
            raise ParameterMismatch(f"the network has no layer {name!r}; use the model that the profile was made for")
        layer = known[name]
        if names and name in names:
            found[name] = _named(layer, names[name], parameters)
        else:
            canonical = _dense(layer, stored)
            found[name] = _by_name(layer, canonical, parameters) or _by_values(layer, canonical, parameters)
    for name, weight in found.items():
        if (whole := parametrisation_of(module, weight.name)) is not None:
            raise ParameterMismatch(
                f"layer {name!r}: the module computes {whole!r} from parameter {weight.name!r}; remove the "
                "parametrisation first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        if (other_layer := _same_weight(known[name], known.values(), stored)) is not None:
            raise ParameterMismatch(
                f"layers {name!r} and {other_layer!r} are both parameter {weight.name!r}, each with a norm folded into "
                "it, so they can't be pruned apart; give each its own layer before the export"
            )
    owners: dict[str, str] = {}
    for name, weight in found.items():
        if (other := owners.setdefault(weight.name, name)) != name:
            raise ParameterMismatch(
                f"layers {other!r} and {name!r} are both parameter {weight.name!r}; give names={{layer: parameter}}"
            )
    return found


def _dense(layer: Layer, stored: Mapping[str, onnx.TensorProto]) -> torch.Tensor:
    """(out, in, *kernel)"""
    values = torch.from_numpy(onnx.numpy_helper.to_array(stored[layer.weight]).astype(np.float32))
    return to_canonical(layer, values)


def _same_weight(layer: Layer, others: Iterable[Layer], stored: Mapping[str, onnx.TensorProto]) -> str | None:
    """Another layer whose own weight is this one's up to a factor for each output channel."""
    if np.prod(layer.shape[1:]) < 2:  # one number is a multiple of any other
        return None
    dense = _dense(layer, stored)
    for other in others:
        apart = other.weight != layer.weight and other.shape == layer.shape and other.weight in stored
        if apart and _proportional(_dense(other, stored), dense):
            return other.name
    return None


def _named(layer: Layer, name: str, parameters: Mapping[str, nn.Parameter]) -> ModuleWeight:
    if name not in parameters:
        raise ParameterMismatch(f"layer {layer.name!r}: the module has no parameter {name!r}")
    forms = _forms(layer, parameters[name])
    if not forms:
        raise ParameterMismatch(
            f"parameter {name!r} has shape {tuple(parameters[name].shape)}, layer {layer.name!r} is {layer.shape}"
        )
    return ModuleWeight(name, forms[0])  # a square weight fits both ways: (out, in) is how PyTorch's layers store it


def _forms(layer: Layer, parameter: nn.Parameter) -> list[bool]:
    """The ways to read the parameter, as it is (False) or transposed (True), that give the layer's shape."""
    shape = tuple(parameter.shape)
    ways = (False, True) if len(shape) == 2 else (False,)
    return [turned for turned in ways if (shape[::-1] if turned else shape) == layer.shape]


def _by_name(layer: Layer, dense: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> ModuleWeight | None:
    """The parameter that has the initializer's name, perhaps below or above a wrapper's prefix, and fits its shape."""
    fitting = {name: forms for name, parameter in parameters.items() if (forms := _forms(layer, parameter))}
    wrapped = [name for name in fitting if name.endswith(f".{layer.weight}") or layer.weight.endswith(f".{name}")]
    if layer.weight in fitting:
        wrapped = [layer.weight]
    if len(wrapped) != 1:
        return None
    ways = [ModuleWeight(wrapped[0], turned) for turned in fitting[wrapped[0]]]
    told = [one for one in ways if _proportional(one.canonical(parameters[one.name].detach()), dense)]
    if len(ways) == 1 or len(told) == 1:
        return (told or ways)[0]
    return ModuleWeight(wrapped[0], layer.transposed)  # square, and trained since: as the file stores it


def _by_values(layer: Layer, dense: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> ModuleWeight:
    """The one parameter whose output channels are the layer's up to a factor each. dense: (out, in, *kernel)."""
    fitting = [
        ModuleWeight(name, turned) for name, parameter in parameters.items() for turned in _forms(layer, parameter)
    ]
    equal = [one for one in fitting if _proportional(one.canonical(parameters[one.name].detach()), dense)]
    if len(equal) == 1:
        return equal[0]
    if equal:
        raise ParameterMismatch(
            f"weight {layer.weight!r} of layer {layer.name!r} has the values of several parameters: "
            f"{', '.join(one.name for one in equal)}; give names={{layer: parameter}}"
        )
    raise ParameterMismatch(
        f"weight {layer.weight!r} {layer.shape} of layer {layer.name!r} has the name and the values of no parameter, "
        f"not even up to a factor for each output channel as a folded BatchNorm leaves it ({len(fitting)} have its "
        "shape); start from the weights that were exported, or give names={layer: parameter}"
    )


def _proportional(candidate: torch.Tensor, dense: torch.Tensor) -> bool:
    """Whether each row of one is a multiple of the other's. Both (out, in, *kernel)."""
    a, b = candidate.float().cpu().flatten(1), dense.flatten(1)
    scale = a.norm(dim=1) * b.norm(dim=1)
    if not bool((scale > 0).any()):
        return bool((a == b).all())
    compared = scale > 0  # a channel that BatchNorm switched off tells nothing
    return bool(((a * b).sum(1)[compared].abs() >= (1 - TOLERANCE) * scale[compared]).all())

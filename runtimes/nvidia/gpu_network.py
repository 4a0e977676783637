"""A network on the GPU: its 2:4 layers in the kernels that win, the rest fused, one profile row for each layer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..base import Arrays, LayerTime, ModelRefused, one_line
from ..model_file import LAYER_OPS, FixedModel
from .cuda_device import Device
from .half_precision import original_names, skeleton
from .semi_structured import layer_weight
from .sparse_nodes import Choice, WeightedNode, choose, weighted_nodes

DENSE_KERNELS = {"Conv": "cudnn", "Gemm": "cublas", "MatMul": "cublas"}
FUSED, NOT_FUSED = "torch.compile", "none"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LayerNode:
    """A node that has a row of its own in the profile."""

    name: str
    op: str
    outputs: tuple[str, ...]
    kernel: str
    sparse: bool
    sparsity: float


class GpuNetwork:
    """A module on the device, its 2:4 layers in the kernels that win, the rest fused."""

    def __init__(
        self,
        module: Any,
        model: onnx.ModelProto,
        fixed: FixedModel,
        precision: str,
        pick: bool,
        device: Device,
        fusions: dict[str, Any] | None,
    ) -> None:
        import torch

        from .fused import Layers, Tensors, as_operator

        self._torch, self._device = torch, device
        self._module = module.to(device.place)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = _channels_last(tensor.data)
        self.fixed = fixed
        self.inputs = self._placed(fixed.inputs)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        choices = self._take_sparse_kernels(model.graph, stored, precision, pick)
        self._nodes, self._rest = _split(model.graph, fixed, stored, choices, precision)
        dense = [self._module.node(node.name).forward for node in self._nodes]
        forwards = [
            choices[node.name].forward or plain if node.name in choices else plain
            for node, plain in zip(self._nodes, dense, strict=True)
        ]
        self._layers = Layers(forwards, dense, [node.op == "Conv" for node in self._nodes])
        for number, node in enumerate(self._nodes):
            self._module.node(node.name).forward = as_operator(number)  # nn.Module calls what the instance has
        self._tensors = Tensors(self._module)
        self._fused = self._fuse(model, precision, fusions)
        for name, value in self(self.inputs).items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ModelRefused(f"in {precision} output {name!r} isn't finite; bf16 has the range of fp32")
        self.choices = {node.outputs[0]: choices[node.name] for node in self._nodes if node.name in choices}

    @property
    def fusion(self) -> str:
        """What fuses the nodes between the layers."""
        return NOT_FUSED if self._fused is None else FUSED

    def __call__(self, inputs: Mapping[str, Any], mark: Any = None) -> dict[str, Any]:
        """Outputs by name, on the device.

        Args:
            mark: called at the beginning and end of each layer.
        """
        with self._torch.no_grad(), self._layers.running(mark):
            if self._fused is None:
                return self._computed(inputs)
            return dict(zip(self.fixed.outputs, self._fused(self._arguments(inputs)), strict=True))

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return {name: value.cpu().numpy() for name, value in self(self._placed(inputs)).items()}

    def rows(self, device: Device, iterations: int, warmup: int) -> list[LayerTime]:
        """The mean over the iterations of what each layer takes, and all the rest together."""

        def marked(mark: Any) -> None:
            mark()
            self(self.inputs, mark)
            mark()

        seconds = np.mean(device.marked_seconds(marked, iterations, warmup), axis=0)  # rest, layer, rest, ..., rest
        layers = dict(zip(self._layers.order, seconds[1::2], strict=True))  # fusing may have changed their order
        rows = [
            LayerTime(node.outputs, node.kernel, float(layers[number]), node.sparse, node.sparsity)
            for number, node in enumerate(self._nodes)
        ]
        return [*rows, LayerTime(self._rest, f"fusion: {self.fusion}", float(seconds[::2].sum()), False, None)]

    def _computed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs, one operator after the other."""
        try:
            return self._module(inputs)
        except (RuntimeError, ValueError, IndexError) as exc:
            raise ModelRefused(f"cusparselt can't run the model: {one_line(str(exc))}") from exc

    def _arguments(self, inputs: Mapping[str, Any]) -> list[Any]:
        return [*self._tensors.own, *(inputs[name] for name in self.inputs)]

    def _placed(self, inputs: Arrays) -> dict[str, Any]:
        place, made = self._device.place, self._torch.from_numpy
        return {name: _channels_last(made(np.array(value)).to(place)) for name, value in inputs.items()}

    def _fuse(self, model: onnx.ModelProto, precision: str, fusions: dict[str, Any] | None) -> Any:
        """The compiled graph, from those that are there or new; None where nothing shall or can be fused."""
        from .fused import fuse, is_close

        if fusions is None:
            return None
        with self._torch.no_grad(), self._layers.running():
            expected = [*self._computed(self.inputs).values()]
        key = _structure(model, self._tensors, self.inputs)
        if key not in fusions:
            try:
                fusions[key] = fuse(self._module, self._tensors, self._layers, self.inputs, self._device.compiled)
            except Exception as exc:  # tracing and compiling raise anything
                _logger.warning("the network runs one kernel an operator: it can't be fused (%s)", one_line(str(exc)))
                fusions[key] = None
        compiled = fusions[key]
        if compiled is None:
            return None
        with self._torch.no_grad(), self._layers.running():
            if not is_close(compiled(self._arguments(self.inputs)), expected, precision):
                _logger.warning("the network runs one kernel an operator: fused, it computes something else")
                return None
        return compiled

    def _take_sparse_kernels(
        self, graph: onnx.GraphProto, stored: Mapping[str, np.ndarray], precision: str, pick: bool
    ) -> dict[str, Choice]:
        """Node name -> how it runs, for each layer with 2:4 weights."""
        found = weighted_nodes(graph, stored)
        called: dict[str, tuple[Any, ...]] = {}

        def keep(name: str) -> Any:
            return lambda module, arguments: called.__setitem__(name, arguments)

        hooks = [self._module.node(name).register_forward_pre_hook(keep(name)) for name in found]
        choices = {}
        with self._torch.no_grad():
            self._computed(self.inputs)
            for hook in hooks:
                hook.remove()
            for node in graph.node:
                if node.name in found:
                    module = self._module.node(node.name)
                    has_stored_bias = len(node.input) > 2 and node.input[2] in stored
                    arguments = called.pop(node.name)
                    layer = WeightedNode(node, found[node.name], module.forward, arguments, has_stored_bias)
                    choices[node.name] = choose(layer, DENSE_KERNELS[node.op_type], precision, pick, self._device)
        return choices


def _channels_last(tensor: Any) -> Any:
    """Images and kernels as tensor cores take them: others would be turned round and back."""
    import torch

    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _split(
    graph: onnx.GraphProto,
    fixed: FixedModel,
    stored: Mapping[str, np.ndarray],
    choices: Mapping[str, Choice],
    precision: str,
) -> tuple[list[_LayerNode], tuple[str, ...]]:
    """The layers in the order of the graph, and the tensors of the user's graph that all other nodes make."""
    named = original_names(graph, fixed.proto.graph, precision)
    layers: list[_LayerNode] = []
    rest: list[str] = []
    for node in graph.node:
        if node.op_type == "Constant":
            continue  # runs once and for all
        weight = layer_weight(node, stored) if node.op_type in LAYER_OPS else None
        outputs = tuple(named.pop(name) for name in node.output if name in named)  # each tensor is made once
        if weight is None:
            rest += outputs
            continue
        choice = choices.get(node.name, Choice(DENSE_KERNELS[node.op_type]))
        sparsity = 1 - np.count_nonzero(weight) / weight.size
        layers.append(_LayerNode(node.name, node.op_type, outputs, choice.kernel, choice.sparse, float(sparsity)))
    return layers, tuple(rest)


def _structure(model: onnx.ModelProto, tensors: Any, inputs: Mapping[str, Any]) -> str:
    """What networks have in common that differ in their weights only: the graph, and all numbers that it carries."""
    graph = onnx.GraphProto()
    graph.CopyFrom(skeleton(model).graph)
    del graph.initializer[:]
    values = (*tensors.own, *inputs.values())
    shapes = [(tuple(value.shape), value.stride(), str(value.dtype)) for value in values]
    carried = [
        tensor.SerializeToString()
        for tensor in model.graph.initializer
        if tensor.name not in tensors.names or np.prod(tensor.dims) <= 1
    ]
    return hashlib.sha256(repr((graph.SerializeToString(), [*inputs], shapes, carried)).encode()).hexdigest()

"""NVIDIA GPUs in PyTorch, 2:4 weights in cuSPARSELt's kernels where these are faster. Run on an H200.

The network is computed in fp16 or bf16, images with channels last, and replayed as one CUDA graph, so the CPU doesn't
count. What is between its layers is fused by torch.compile (`fused.py`). Times are the GPU's own. The network runs
again and again on inputs that are there already: its caches hold what they would hold in use.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..base import (
    Arrays,
    Closing,
    Environment,
    LayerTime,
    ModelRefused,
    RuntimeUnavailable,
    check_iterations,
    check_precision,
    one_line,
    still_open,
)
from ..load import UnknownLoad
from ..model_file import LAYER_OPS, FixedModel, check_inputs, fix_model
from ..workload import Workload
from .cuda_device import Cuda, Device
from .half_precision import PRECISIONS, in_half_precision, number_nodes, original_names, skeleton
from .semi_structured import PATTERN, layer_weight
from .sparse_nodes import Choice, WeightedNode, choose, weighted_nodes

DENSE_KERNELS = {"Conv": "cudnn", "Gemm": "cublas", "MatMul": "cublas"}
FUSED, NOT_FUSED = "torch.compile", "none"

_logger = logging.getLogger(__name__)


class CuSparseLt(UnknownLoad):
    """PyTorch on the GPU of this machine.

    Args:
        precision: "fp16", or "bf16" with the range of fp32.
        reader: "MODULE:NAME" of what makes a torch.nn.Module of an onnx.ModelProto: it maps inputs by name to outputs
            by name, and its `node(name)` is the module of a node, called with the node's input tensors. Named and
            not imported here, because runtimes know no networks.
        pick: False takes a 2:4 kernel wherever there is one, to see what it costs where it is slower.
        fuse: False leaves what is between the layers to one kernel an operator.
        device: a stand-in for the GPU.
    """

    name = "cusparselt"
    patterns = frozenset({PATTERN})

    def __init__(
        self,
        precision: str = "fp16",
        *,
        reader: str | None = None,
        pick: bool = True,
        fuse: bool = True,
        device: Device | None = None,
    ) -> None:
        check_precision(self.name, precision, PRECISIONS)
        self.precision = precision
        self._reader, self._pick = reader, pick
        self._fusions: dict[str, Any] | None = {} if fuse else None  # graph -> compiled, or why it isn't
        self._device: Device = device or Cuda()
        self._built: tuple[Any, _Network] | None = None  # the last one: whoever profiles a network opens it then

    def check(self) -> str:
        """PyTorch's version; raises RuntimeUnavailable where it can't be used."""
        version = self._device.check()
        self._read()
        return version

    def open(
        self,
        model: Path,
        workload: Workload,
        *,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> CuSparseLtSession:
        """See `Runtime.open`. Each layer with 2:4 weights is measured, and its kernels compared with the dense one.

        Raises:
            ModelRefused: also where the network can't be computed in this precision.
        """
        network = self._network(Path(model), workload, zeros, seed)
        fields = self._device.fields()
        fields["options"] = (*fields["options"], ("fusion", network.fusion))
        environment = Environment(
            runtime=self.name,
            version=self._device.check(),
            precision=self.precision,
            threads=workload.threads_or_cores,
            batch=workload.batch,
            **fields,
        )
        return CuSparseLtSession(network, environment, self._device)

    def layer_seconds(
        self,
        model: Path,
        workload: Workload,
        *,
        iterations: int,
        warmup: int,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
        merged: bool = True,
    ) -> list[LayerTime]:
        """See `Runtime.layer_seconds`: a row for each layer, and one for all that runs between them."""
        check_iterations(iterations)
        network = self._network(Path(model), workload, zeros, seed)
        return network.rows(self._device, iterations, warmup)

    def close(self) -> None:
        """Drop the network that was kept; sessions own what they use."""
        self._built = None

    def _network(self, path: Path, workload: Workload, zeros: Mapping[str, float] | None, seed: int) -> _Network:
        written = path.stat().st_mtime_ns if path.exists() else None  # what is missing is refused when it is read
        question = (path.resolve(), written, workload, sorted((zeros or {}).items()), seed)
        if self._built is None or self._built[0] != question:
            self._built = None  # its memory comes before the next one's
            self._built = question, self._build(path, workload, zeros, seed)
        return self._built[1]

    def _build(self, path: Path, workload: Workload, zeros: Mapping[str, float] | None, seed: int) -> _Network:
        fixed = fix_model(path, workload, zeros, seed)
        fixed = replace(fixed, proto=folded(fixed.proto))
        self._device.check()
        model = in_half_precision(fixed.proto, self.precision)
        number_nodes(model.graph)
        try:
            module = self._read()(model).eval()
        except (ValueError, NotImplementedError) as exc:  # what readers raise for what they can't run
            raise ModelRefused(f"cusparselt can't run the model: {one_line(str(exc))}") from exc
        return _Network(module, model, fixed, self.precision, self._pick, self._device, self._fusions)

    def _read(self) -> Any:
        """The reader."""
        if self._reader is None:
            raise RuntimeUnavailable("cusparselt was given no reader of ONNX files; open it with pipeline.engine")
        module, _, name = self._reader.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError as exc:
            raise RuntimeUnavailable(
                f"cusparselt needs {module}, which can't be imported ({one_line(str(exc))})"
            ) from exc


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with everything computed that only shapes and constants decide: nothing is left to the CPU."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    read = ir.from_proto(model)
    fold_constants(read, onnx_shape_inference=True)
    RemoveUnusedNodesPass()(read)
    return ir.to_proto(read)


@dataclass(frozen=True)
class _LayerNode:
    """A node that has a row of its own in the profile."""

    name: str
    op: str
    outputs: tuple[str, ...]
    kernel: str
    sparse: bool
    sparsity: float


class _Network:
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


class CuSparseLtSession(Closing):
    """One network on the GPU."""

    fallback = None

    def __init__(self, network: _Network, environment: Environment, device: Device) -> None:
        self.environment = environment
        self._network: _Network | None = network
        self._device = device
        self._replay = device.replayable(lambda: network(network.inputs))

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        network = self._open()
        check_inputs(inputs, network.fixed.inputs)
        return network.run(inputs)

    def seconds(self, iterations: int, warmup: int = 0) -> list[float]:
        """See `Session.seconds`: the GPU's own time, inputs and outputs staying there."""
        self._open()
        return self._device.seconds(self._replay, warmup + iterations)[warmup:]

    @property
    def choices(self) -> Mapping[str, Choice]:
        """Output tensor -> how its layer runs, and what it took when it was measured by itself; of all 2:4 layers."""
        return self._open().choices

    def layer_seconds(self, iterations: int, warmup: int = 0) -> list[LayerTime]:
        """The profile of this session's network; see `CuSparseLt.layer_seconds`."""
        return self._open().rows(self._device, iterations, warmup)

    def close(self) -> None:
        """Drop the network."""
        self._network = None
        self._replay = lambda: None

    def _open(self) -> _Network:
        return still_open(self._network)


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

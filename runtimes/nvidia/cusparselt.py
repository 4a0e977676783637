"""NVIDIA GPUs in PyTorch, 2:4 weights in cuSPARSELt's kernels where these are faster. Not run on hardware yet.

The network is computed in fp16 or bf16 and replayed as one CUDA graph, so the CPU doesn't count. Times are the GPU's
own. The network runs again and again on inputs that are there already: its caches hold what they would hold in use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from .half_precision import PRECISIONS, in_half_precision, number_nodes, original_names
from .semi_structured import PATTERN, layer_weight
from .sparse_nodes import Choice, WeightedNode, choose, weighted_nodes

DENSE_KERNELS = {"Conv": "cudnn", "Gemm": "cublas", "MatMul": "cublas"}
KERNEL_NAME = 60  # characters


class CuSparseLt(UnknownLoad):
    """PyTorch on the GPU of this machine.

    Args:
        precision: "fp16", or "bf16" with the range of fp32.
        reader: "MODULE:NAME" of what makes a torch.nn.Module of an onnx.ModelProto: it maps inputs by name to outputs
            by name, and its `node(name)` is the module of a node, called with the node's input tensors. Named and
            not imported here, because runtimes know no networks.
        pick: False takes a 2:4 kernel wherever there is one, to see what it costs where it is slower.
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
        device: Device | None = None,
    ) -> None:
        check_precision(self.name, precision, PRECISIONS)
        self.precision = precision
        self._reader, self._pick = reader, pick
        self._device: Device = device or Cuda()

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
        environment = Environment(
            runtime=self.name,
            version=self._device.check(),
            precision=self.precision,
            threads=workload.threads_or_cores,
            batch=workload.batch,
            **self._device.fields(),
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
        """See `Runtime.layer_seconds`: a row for each layer, one for all that runs between two of them."""
        check_iterations(iterations)
        network = self._network(Path(model), workload, zeros, seed)
        return network.rows(self._device, iterations, warmup)

    def close(self) -> None:
        """Nothing to release: sessions own what they use."""

    def _network(self, path: Path, workload: Workload, zeros: Mapping[str, float] | None, seed: int) -> _Network:
        fixed = fix_model(path, workload, zeros, seed)
        self._device.check()
        model = in_half_precision(fixed.proto, self.precision)
        number_nodes(model.graph)
        try:
            module = self._read()(model).eval().to(self._device.place)
        except (ValueError, NotImplementedError) as exc:  # what readers raise for what they can't run
            raise ModelRefused(f"cusparselt can't run the model: {one_line(str(exc))}") from exc
        return _Network(module, model, fixed, self.precision, self._pick, self._device)

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


@dataclass(frozen=True)
class _Group:
    """Nodes that have a row together: one layer, or everything up to the next one."""

    names: tuple[str, ...]
    outputs: tuple[str, ...]
    kernel: str
    sparse: bool = False
    sparsity: float | None = None


class _Network:
    """A module on the device, its 2:4 layers in the kernels that win."""

    def __init__(
        self, module: Any, model: onnx.ModelProto, fixed: FixedModel, precision: str, pick: bool, device: Device
    ) -> None:
        import torch

        self._torch, self._module, self._device = torch, module, device
        self.fixed = fixed
        self.inputs = self._placed(fixed.inputs)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        choices = self._take_sparse_kernels(model.graph, stored, precision, pick)
        self._groups = _groups(model.graph, fixed, stored, choices, precision)
        for name, value in self(self.inputs).items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ModelRefused(f"in {precision} output {name!r} isn't finite; bf16 has the range of fp32")
        named = {group.names[0]: group.outputs[0] for group in self._groups if group.names[0] in choices}
        self.choices = {named[name]: choice for name, choice in choices.items()}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, on the device."""
        with self._torch.inference_mode():
            try:
                return self._module(inputs)
            except (RuntimeError, ValueError, IndexError) as exc:
                raise ModelRefused(f"cusparselt can't run the model: {one_line(str(exc))}") from exc

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return {name: value.cpu().numpy() for name, value in self(self._placed(inputs)).items()}

    def rows(self, device: Device, iterations: int, warmup: int) -> list[LayerTime]:
        """The mean over the iterations of what each group takes."""

        def marked(mark: Any) -> None:
            # A mark before the first node of each group, and one at the end.
            hooks = [
                self._module.node(group.names[0]).register_forward_pre_hook(lambda *_: mark()) for group in self._groups
            ]
            try:
                self(self.inputs)
            finally:
                for hook in hooks:
                    hook.remove()
            mark()

        seconds = np.mean(device.marked_seconds(marked, iterations, warmup), axis=0)
        return [
            LayerTime(group.outputs, group.kernel, float(value), group.sparse, group.sparsity)
            for group, value in zip(self._groups, seconds, strict=True)
        ]

    def _placed(self, inputs: Arrays) -> dict[str, Any]:
        return {name: self._torch.from_numpy(np.array(value)).to(self._device.place) for name, value in inputs.items()}

    def _take_sparse_kernels(
        self, graph: onnx.GraphProto, stored: Mapping[str, np.ndarray], precision: str, pick: bool
    ) -> dict[str, Choice]:
        """Node name -> how it runs, for each layer with 2:4 weights; the faster ones are put in place."""
        found = weighted_nodes(graph, stored)
        called: dict[str, tuple[Any, ...]] = {}

        def keep(name: str) -> Any:
            return lambda module, arguments: called.__setitem__(name, arguments)

        hooks = [self._module.node(name).register_forward_pre_hook(keep(name)) for name in found]
        self(self.inputs)
        for hook in hooks:
            hook.remove()
        choices = {}
        with self._torch.inference_mode():
            for node in graph.node:
                if node.name in found:
                    module = self._module.node(node.name)
                    has_stored_bias = len(node.input) > 2 and node.input[2] in stored
                    arguments = called.pop(node.name)
                    layer = WeightedNode(node, found[node.name], module.forward, arguments, has_stored_bias)
                    choices[node.name] = choose(layer, DENSE_KERNELS[node.op_type], precision, pick, self._device)
        for name, choice in choices.items():
            if choice.forward:
                self._module.node(name).forward = choice.forward  # nn.Module calls what the instance has
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


def _groups(
    graph: onnx.GraphProto,
    fixed: FixedModel,
    stored: Mapping[str, np.ndarray],
    choices: Mapping[str, Choice],
    precision: str,
) -> list[_Group]:
    """The rows of a profile, in the order in which they run."""
    named = original_names(graph, fixed.proto.graph, precision)
    groups: list[_Group] = []
    between: list[onnx.NodeProto] = []

    def end_between() -> None:
        if between:
            kinds = "+".join(dict.fromkeys(node.op_type for node in between))
            groups.append(_Group(_names(between), _outputs(between, named), one_line(kinds, KERNEL_NAME)))
            between.clear()

    for node in graph.node:
        if node.op_type == "Constant":
            continue  # runs once and for all
        weight = layer_weight(node, stored) if node.op_type in LAYER_OPS else None
        if weight is None:
            between.append(node)
            continue
        end_between()
        choice = choices.get(node.name, Choice(DENSE_KERNELS[node.op_type]))
        sparsity = 1 - np.count_nonzero(weight) / weight.size
        groups.append(_Group((node.name,), _outputs([node], named), choice.kernel, choice.sparse, float(sparsity)))
    end_between()
    return groups


def _names(nodes: Sequence[onnx.NodeProto]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _outputs(nodes: Sequence[onnx.NodeProto], named: dict[str, str]) -> tuple[str, ...]:
    """The tensors of the user's graph that the nodes make, each of which is made once."""
    return tuple(named.pop(name) for node in nodes for name in node.output if name in named)

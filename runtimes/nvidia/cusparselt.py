"""NVIDIA GPUs in PyTorch, 2:4 weights in cuSPARSELt's kernels where these are faster. Run on an H200.

The network is computed in fp16 or bf16, images with channels last, and replayed as one CUDA graph, so the CPU doesn't
count. What is between its layers is fused by torch.compile (`fused.py`). Times are the GPU's own. The network runs
again and again on inputs that are there already: its caches hold what they would hold in use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

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
from ..model_file import check_inputs, fix_model
from ..workload import Workload
from .cuda_device import Cuda, Device
from .gpu_network import GpuNetwork
from .half_precision import PRECISIONS, in_half_precision, number_nodes
from .semi_structured import PATTERN
from .sparse_nodes import Choice


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
    usage = ""

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
        self._built: tuple[Any, GpuNetwork] | None = None  # the last one: whoever profiles a network opens it then

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

    def _network(self, path: Path, workload: Workload, zeros: Mapping[str, float] | None, seed: int) -> GpuNetwork:
        written = path.stat().st_mtime_ns if path.exists() else None  # what is missing is refused when it is read
        question = (path.resolve(), written, workload, sorted((zeros or {}).items()), seed)
        if self._built is None or self._built[0] != question:
            self._built = None  # its memory comes before the next one's
            self._built = question, self._build(path, workload, zeros, seed)
        return self._built[1]

    def _build(self, path: Path, workload: Workload, zeros: Mapping[str, float] | None, seed: int) -> GpuNetwork:
        fixed = fix_model(path, workload, zeros, seed)
        fixed = replace(fixed, proto=folded(fixed.proto))
        self._device.check()
        model = in_half_precision(fixed.proto, self.precision)
        number_nodes(model.graph)
        try:
            module = self._read()(model).eval()
        except (ValueError, NotImplementedError) as exc:  # what readers raise for what they can't run
            raise ModelRefused(f"cusparselt can't run the model: {one_line(str(exc))}") from exc
        return GpuNetwork(module, model, fixed, self.precision, self._pick, self._device, self._fusions)

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


class CuSparseLtSession(Closing):
    """One network on the GPU."""

    fallback = None

    def __init__(self, network: GpuNetwork, environment: Environment, device: Device) -> None:
        self.environment = environment
        self._network: GpuNetwork | None = network
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

    def _open(self) -> GpuNetwork:
        return still_open(self._network)

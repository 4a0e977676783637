"""TensorRT 10 and 11 on NVIDIA GPUs, 2:4 weights in sparse kernels where TensorRT picks them. Not run on hardware yet.

The network is strongly typed: the ONNX file that TensorRT gets carries fp16 or bf16 itself. What the build log, the
engine's inspector and its profiler say of each layer becomes the rows of its profile: whether its weights were
eligible for sparse kernels, whether one was picked, and its time. Of `trtexec`, where there is no Python package, the
same is read from the files that it exports.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..atomic import WorkFolder
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
from ..model_file import FixedModel, check_inputs, fix_model
from ..workload import Workload
from .cuda_device import Cuda
from .half_precision import PRECISIONS, check_same_results, in_half_precision, number_nodes, original_names, skeleton
from .semi_structured import PATTERN
from .sparse_nodes import weighted_nodes
from .trt_engine import TrtPackage
from .trt_log import ProfiledLayer, UnreadableLog, engine_layers, layer_rows, sparsity_lists
from .trtexec import TrtExec

logger = logging.getLogger(__name__)

VARIABLE = "ONNX_SPDY_TRTEXEC"
CACHE_VARIABLE = "ONNX_SPDY_TIMING_CACHE"
CACHE = "~/.cache/onnx-spdy"


class Engine(Protocol):
    """A built network."""

    log: str
    layers: str  # the inspector's JSON

    def fields(self) -> dict[str, Any]: ...

    def run(self, inputs: Arrays, outputs: dict[str, np.dtype]) -> dict[str, np.ndarray]: ...

    def seconds(self, inputs: Arrays, iterations: int, warmup: int) -> list[float]: ...

    def profile(self, inputs: Arrays, iterations: int, warmup: int) -> list[ProfiledLayer]: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """A way to TensorRT."""

    def check(self) -> str: ...

    def build(self, model: Path, cache: Path) -> Engine: ...


class TensorRt(UnknownLoad):
    """TensorRT on the GPU of this machine: its Python package, else the command `trtexec`.

    The times of kernels that a build has measured are kept in a timing cache: the next one takes the same kernels.

    Args:
        precision: "fp16", or "bf16" with the range of fp32.
        trtexec: the command; default: ONNX_SPDY_TRTEXEC, or the one on PATH. One that is given goes before the package.
        backend: instead of both.
    """

    name = "tensorrt"
    patterns = frozenset({PATTERN})
    usage = ""

    def __init__(self, precision: str = "fp16", *, trtexec: str | None = None, backend: Backend | None = None) -> None:
        check_precision(self.name, precision, PRECISIONS)
        self.precision = precision
        self._trtexec = trtexec or os.environ.get(VARIABLE)
        self._backend = backend
        self._checked: set[bytes] = set()

    def check(self) -> str:
        """TensorRT's version; raises RuntimeUnavailable where it can't be used."""
        return self._find().check()

    def open(
        self,
        model: Path,
        workload: Workload,
        *,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> TensorRtSession:
        """See `Runtime.open`; builds the engine, which takes minutes for a large network."""
        network = self._build(Path(model), workload, zeros, seed)
        environment = Environment(
            runtime=self.name,
            version=self.check(),
            precision=self.precision,
            threads=workload.threads_or_cores,
            batch=workload.batch,
            **network.engine.fields(),
        )
        return TensorRtSession(network, environment)

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
        """See `Runtime.layer_seconds`. TensorRT can't be asked not to merge layers."""
        check_iterations(iterations)
        network = self._build(Path(model), workload, zeros, seed)
        try:
            return network.rows(iterations, warmup)
        finally:
            network.close()

    def close(self) -> None:
        """Nothing to release: sessions own what they use."""

    def _find(self) -> Backend:
        """The package, or trtexec."""
        if self._backend is None:
            self._backend = self._found()
        return self._backend

    def _found(self) -> Backend:
        if self._trtexec:
            return TrtExec(self._trtexec)
        try:
            return TrtPackage(importlib.import_module("tensorrt"), Cuda(self.name))
        except ImportError as exc:
            if command := shutil.which("trtexec"):
                return TrtExec(command)
            raise RuntimeUnavailable(
                f"tensorrt can't be imported ({one_line(str(exc))}) and there is no trtexec on PATH; install TensorRT "
                f"10 or 11, or name a trtexec in {VARIABLE}"
            ) from exc

    def _build(self, path: Path, workload: Workload, zeros: Mapping[str, float] | None, seed: int) -> _Network:
        fixed = fix_model(path, workload, zeros, seed)
        backend = self._find()
        backend.check()
        model = in_half_precision(fixed.proto, self.precision)
        self._check(fixed, model)
        number_nodes(model.graph)
        folder = WorkFolder()
        try:
            file = Path(folder.name) / "network.onnx"
            onnx.save(model, file, save_as_external_data=model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF)
            engine = backend.build(file, _timing_cache())
        except BaseException:
            folder.cleanup()
            raise
        return _Network(engine, model, fixed, self.precision, folder)

    def _check(self, fixed: FixedModel, model: onnx.ModelProto) -> None:
        """Compare the converted network with the original; once for all that differ in their weights only."""
        key = skeleton(fixed.proto).SerializeToString()
        if key in self._checked:
            return
        if not check_same_results(fixed.proto, model, self.precision, fixed.inputs):
            logger.info("ONNX Runtime can't run the network in %s, so it wasn't compared with fp32", self.precision)
        self._checked.add(key)  # only now: a comparison that fails is made again


@dataclass(frozen=True)
class _Network:
    """An engine and what it was built from."""

    engine: Engine
    model: onnx.ModelProto
    fixed: FixedModel
    precision: str
    folder: WorkFolder

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            ModelRefused: one isn't finite.
        """
        values = self.fixed.proto.graph.output
        types = {value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in values}
        found = self.engine.run(inputs, types)
        for name, value in found.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                raise ModelRefused(f"in {self.precision} output {name!r} isn't finite; bf16 has the range of fp32")
        return {name: found[name] for name in self.fixed.outputs}

    def rows(self, iterations: int, warmup: int) -> list[LayerTime]:
        """The engine's layers."""
        graph = self.model.graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        weights = weighted_nodes(graph, stored)
        try:
            return layer_rows(
                self.engine.profile(self.fixed.inputs, iterations, warmup),
                engine_layers(self.engine.layers),
                sparsity_lists(self.engine.log),
                graph,
                original_names(graph, self.fixed.proto.graph, self.precision),
                {name: float((weight == 0).mean()) for name, weight in weights.items()},
            )
        except UnreadableLog as exc:
            raise ModelRefused(f"what TensorRT says of this network can't be read: {one_line(str(exc))}") from exc

    def close(self) -> None:
        self.engine.close()
        self.folder.cleanup()


class TensorRtSession(Closing):
    """One network in TensorRT."""

    fallback = None

    def __init__(self, network: _Network, environment: Environment) -> None:
        self.environment = environment
        self._network: _Network | None = network

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        network = self._open()
        check_inputs(inputs, network.fixed.inputs)
        return network.run(inputs)

    def seconds(self, iterations: int, warmup: int = 0) -> list[float]:
        """See `Session.seconds`: the GPU's own time, inputs and outputs staying there."""
        network = self._open()
        return network.engine.seconds(network.fixed.inputs, iterations, warmup)

    def close(self) -> None:
        """Release the engine."""
        if self._network:
            self._network.close()
        self._network = None

    def _open(self) -> _Network:
        return still_open(self._network)


def _timing_cache() -> Path:
    """The file of the timing cache; TensorRT itself refuses what belongs to another GPU or version."""
    path = Path(os.environ.get(CACHE_VARIABLE) or Path(CACHE).expanduser() / "tensorrt.cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

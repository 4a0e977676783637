"""TensorRT through its Python package, versions 10 and 11. Not run on hardware yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..atomic import replacing
from ..base import Arrays, ModelRefused, RuntimeUnavailable, one_line
from .cuda_device import Device
from .trt_log import ProfiledLayer

VERSIONS = (10, 11)


class TrtPackage:
    """The package `tensorrt`; see `Backend` in trt.py.

    Args:
        package: the imported module.
        device: whose memory, graphs and clock are used.
    """

    def __init__(self, package: ModuleType, device: Device) -> None:
        self._package, self._device = package, device

    def check(self) -> str:
        """Its version; raises RuntimeUnavailable where it is another one, or without a GPU."""
        version = str(self._package.__version__)
        if int(version.partition(".")[0]) not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise RuntimeUnavailable(
                f"this is TensorRT {version}; versions {known} are known here, install one of them"
            )
        self._device.check()
        return version

    def build(self, model: Path, cache: Path) -> TrtEngine:
        """An engine of an ONNX file that carries its precision."""
        trt = self._package
        logger = _logger(trt)
        builder = trt.Builder(logger)
        # 10 has to be told that the file's types are meant; 11 knows nothing else.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model.read_bytes()):
            errors = [parser.get_error(number).desc() for number in range(parser.num_errors)]
            raise ModelRefused(f"tensorrt refuses the model: {one_line(' '.join(errors) or logger.last_error())}")
        config = builder.create_builder_config()
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        kept = cache.read_bytes() if cache.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):  # of another GPU
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ModelRefused(f"tensorrt can't build the model: {one_line(logger.last_error())}")
        with replacing(cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        return TrtEngine(trt, engine, "\n".join(logger.lines), self._device)


class TrtEngine:
    """A built engine and its execution context; see `Engine` in trt.py."""

    def __init__(self, trt: ModuleType, engine: Any, log: str, device: Device) -> None:
        self._trt, self._engine, self._device, self.log = trt, engine, device, log
        self.layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        self._context = engine.create_execution_context()
        self._tensors: dict[str, Any] = {}
        self._replay: Any = None

    def fields(self) -> dict[str, Any]:
        """What an `Environment` says of the GPU."""
        return self._device.fields()

    def run(self, inputs: Arrays, outputs: Mapping[str, np.dtype]) -> dict[str, np.ndarray]:
        """Outputs by name, of these types."""
        self._place(inputs)
        self._execute()
        self._synchronize()
        return {name: self._tensors[name].cpu().numpy().astype(kind, copy=False) for name, kind in outputs.items()}

    def seconds(self, inputs: Arrays, iterations: int, warmup: int) -> list[float]:
        """(iterations,) seconds on the GPU, of one CUDA graph, inputs and outputs staying there."""
        self._place(inputs)
        if self._replay is None:
            self._replay = self._device.replayable(self._execute)
        return self._device.seconds(self._replay, warmup + iterations)[warmup:]

    def profile(self, inputs: Arrays, iterations: int, warmup: int) -> list[ProfiledLayer]:
        """Mean seconds of the layers over the iterations."""
        self._place(inputs)
        # A context of its own: one with a profiler is slower, and can't be captured in a graph.
        context = self._engine.create_execution_context()
        for name, tensor in self._tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        profiler = _profiler(self._trt)
        context.profiler = profiler
        for number in range(warmup + iterations):
            if number == warmup:
                profiler.milliseconds.clear()
            self._execute(context)
            self._synchronize()
        return [ProfiledLayer(name, 1e-3 * total / iterations) for name, total in profiler.milliseconds.items()]

    def close(self) -> None:
        """Release the GPU's memory."""
        self._context = self._replay = self._engine = None
        self._tensors = {}

    def _place(self, inputs: Arrays) -> None:
        """Inputs and outputs at addresses that stay."""
        import torch

        for name, array in inputs.items():
            value = torch.from_numpy(np.array(array))
            if name in self._tensors:
                self._tensors[name].copy_(value)
            else:
                self._tensors[name] = value.to(self._device.place)
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            if name not in self._tensors:
                kind = torch.from_numpy(np.empty(0, self._trt.nptype(self._engine.get_tensor_dtype(name)))).dtype
                shape = tuple(self._engine.get_tensor_shape(name))
                self._tensors[name] = torch.empty(shape, dtype=kind, device=self._device.place)
            self._context.set_tensor_address(name, self._tensors[name].data_ptr())

    def _execute(self, context: Any = None) -> None:
        import torch

        stream = torch.cuda.current_stream().cuda_stream if self._device.place == "cuda" else 0
        if not (context or self._context).execute_async_v3(stream):
            raise ModelRefused("tensorrt can't run the model; its log says why")

    def _synchronize(self) -> None:
        import torch

        if self._device.place == "cuda":
            torch.cuda.synchronize()


def _logger(trt: ModuleType) -> Any:
    """A logger that keeps what is said."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                self.lines.append(message)
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "it gives no reason"

    return Logger()


def _profiler(trt: ModuleType) -> Any:
    """A profiler that adds up milliseconds by layer, in the order in which they run."""

    class Profiler(trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.milliseconds: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds[layer_name] = self.milliseconds.get(layer_name, 0.0) + ms

    return Profiler()

"""OpenVINO on the CPU: a dense baseline in fp32 and bf16. It has no kernels for unstructured sparsity."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx

from . import host
from .base import (
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
from .fused_layers import covered_outputs
from .load import WatchesLoad
from .model_file import FixedModel, check_inputs, fix_model
from .workload import Workload

DEVICE = "CPU"
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # our name: OpenVINO's name
TELEMETRY = "openvino_telemetry"
OUTSIDE = "outside the nodes"
NODE = "onnx_spdy_node_"  # what the profiled copy's nodes are called, before their number
MULTIPLIES = frozenset({"Convolution", "FullyConnected", "MatMul"})


class OpenVino(WatchesLoad):
    """OpenVINO's CPU plugin in this process.

    Args:
        precision: "fp32", or "bf16", in which a CPU with bf16 instructions is several times faster. It is
            set in any case: on such a CPU OpenVINO's own default is bf16, whatever the file's weights are.
    """

    name = "openvino"
    patterns: frozenset[str] = frozenset()

    def __init__(self, precision: str = "fp32") -> None:
        check_precision(self.name, precision, PRECISIONS)
        self.precision = precision

    @property
    def usage(self) -> str:
        """See `Runtime.usage`."""
        return f"""\
import openvino
network = openvino.Core().compile_model(MODEL, "CPU", {{"INFERENCE_PRECISION_HINT": "{PRECISIONS[self.precision]}"}})
result = [*network(INPUTS).values()]
"""

    def check(self) -> str:
        """The version of OpenVINO.

        Raises:
            RuntimeUnavailable: it can't be imported, or the CPU has no instructions for the precision.
        """
        self._core()
        return _version()

    def open(
        self,
        model: Path,
        workload: Workload,
        *,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> OpenVinoSession:
        """See `Runtime.open`."""
        fixed = fix_model(Path(model), workload, zeros, seed)
        compiled = self._compile(fixed, workload.threads_or_cores)
        environment = Environment(
            runtime=self.name,
            version=_version(),
            precision=_precision(compiled, fixed),
            threads=compiled.get_property("INFERENCE_NUM_THREADS"),
            batch=workload.batch,
            **host.fields(),
        )
        return OpenVinoSession(compiled, environment, fixed)

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
        """See `Runtime.layer_seconds`. The engine rounds each run's times down to microseconds."""
        check_iterations(iterations)
        fixed = fix_model(Path(model), workload, zeros, seed)
        for number, node in enumerate(fixed.proto.graph.node):
            node.name = f"{NODE}{number}"  # the profile identifies nodes by name: make them unique
        compiled = self._compile(fixed, workload.threads_or_cores, profile=True)
        request = compiled.create_infer_request()
        set_inputs(request, fixed.inputs)
        for _ in range(warmup):
            run_request(request)
        before = _executed(compiled, request) if warmup else {}
        started = perf_counter()
        for _ in range(iterations):
            run_request(request)
        seconds = (perf_counter() - started) / iterations
        nodes = _after_warmup(before, warmup, _executed(compiled, request), iterations)
        return _rows(nodes, seconds, fixed.proto.graph)

    def close(self) -> None:
        """Nothing to release: sessions own what they use."""

    def _core(self) -> Any:
        """OpenVINO's entry point, where it and the CPU can do what is asked."""
        core = _import_engine().Core()
        # Its capabilities tell what the CPU has instructions for. INFERENCE_PRECISION_HINT can't be asked: read
        # back, it says bf16 on any CPU with AVX-512, where bf16 is then emulated and slower than fp32.
        if self.precision == "bf16" and "BF16" not in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
            raise RuntimeUnavailable(
                f"openvino needs a CPU with bf16 instructions (avx512_bf16 or amx_bf16) for bf16, this one has "
                f"{host.instruction_set()}; without them it computes in fp32 or emulates bf16: use openvino in fp32"
            )
        return core

    def _compile(self, fixed: FixedModel, threads: int, *, profile: bool = False) -> Any:
        core = self._core()
        config = _config(PRECISIONS[self.precision], threads, profile)
        with _refusing("openvino refuses the model"):
            return core.compile_model(core.read_model(fixed.to_bytes()), DEVICE, config)


class OpenVinoSession(Closing):
    """One network in OpenVINO."""

    fallback = None

    def __init__(self, compiled: Any, environment: Environment, fixed: FixedModel) -> None:
        self.environment = environment
        self._request = compiled.create_infer_request()
        self._inputs = fixed.inputs
        self._outputs = fixed.outputs

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        check_inputs(inputs, self._inputs)
        request = self._open()
        set_inputs(request, inputs)
        return dict(zip(self._outputs, run_request(request), strict=True))

    def seconds(self, iterations: int, warmup: int = 0) -> list[float]:
        """See `Session.seconds`."""
        request, measured = self._open(), []
        set_inputs(request, self._inputs)
        for number in range(warmup + iterations):
            started = perf_counter()
            run_request(request)
            if number >= warmup:
                measured.append(perf_counter() - started)
        return measured

    def close(self) -> None:
        """Drop the compiled network."""
        self._request = None

    def _open(self) -> Any:
        return still_open(self._request)


def set_inputs(request: Any, inputs: Arrays) -> None:
    """Give a request copies of its inputs, which it keeps for all runs from now on; it has none that nothing reads."""
    tensor = _import_engine().Tensor
    with _refusing("openvino can't take the inputs"):
        for port in request.model_inputs:
            for name in port.get_names().intersection(inputs):
                request.set_tensor(port, tensor(inputs[name]))


def run_request(request: Any) -> list[np.ndarray]:
    """All outputs of one run; a model that fails at inputs of its own shape becomes ModelRefused.

    Inputs are there already: handing them over takes Python longer here than it takes ONNX Runtime.
    """
    with _refusing("openvino can't run the model"):
        return list(request.infer().to_tuple())


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """OpenVINO's own exceptions become ModelRefused."""
    try:
        yield
    except _engine_errors() as exc:
        raise ModelRefused(f"{what}: {one_line(str(exc))}") from exc


def _config(precision: str, threads: int, profile: bool) -> dict[str, Any]:
    """Properties for one run at a time, as fast as `threads` threads can."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        # One thread for each core, as for ONNX Runtime; more threads than cores are what the caller asked for.
        "ENABLE_CPU_PINNING": threads <= host.physical_cores(),
        "ENABLE_HYPER_THREADING": threads > host.physical_cores(),
        "PERF_COUNT": profile,
    }


def _precision(compiled: Any, fixed: FixedModel) -> str:
    """The precision that the compiled network computes in; a quantized file's layers stay int8."""
    floats = {"f16": "fp16"} | {theirs: ours for ours, theirs in PRECISIONS.items()}
    found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    precision = floats.get(found, found)
    if fixed.precision == "int8":
        return "int8" if precision == "fp32" else f"int8+{precision}"
    return precision


def _version() -> str:
    """Such as 2026.4.1, without the build."""
    return str(_import_engine().__version__).partition("-")[0]


def _import_engine() -> Any:
    try:
        with _without_telemetry():
            import openvino
    except ImportError as exc:
        raise RuntimeUnavailable(f"openvino can't be imported ({one_line(str(exc))}); pip install openvino") from exc
    return openvino


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Hide the package that reports usage.

    `import openvino` itself sends an event to Google Analytics and writes an id into the user's home, without
    asking. Its ways to opt out are a file in the home folder (`opt_in_out --opt_out`) and CI=true in the
    environment; neither is ours to set. Where the package can't be imported, OpenVINO takes its own stub
    that does nothing, for as long as the process lives.
    """
    there = {name: module for name, module in sys.modules.items() if name == TELEMETRY}
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(there)


def _engine_errors() -> tuple[type[Exception], ...]:
    """What OpenVINO raises: RuntimeError, and its frontends' errors, which have no base class of their own."""
    frontend = _import_engine().frontend
    kinds = (value for name, value in vars(frontend).items() if name.endswith("Failure"))
    return (RuntimeError, *(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)))


@dataclass(frozen=True)
class _Executed:
    """A node of the graph that OpenVINO runs."""

    kind: str
    kernel: str
    original: tuple[str, ...]  # names of the nodes that it stands for
    microseconds: float  # mean over all runs of the compiled network so far


def _executed(compiled: Any, request: Any) -> dict[str, _Executed]:
    """The nodes of the network that `request` has run, by name, in the order in which they run.

    The runtime model has constants too, which are laid out once and not in a run; the profile has nodes too
    that were fused into others, and lists them with no time. What is in both is what runs.
    """
    profile = {info.node_name: info for info in request.get_profiling_info()}
    found = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        if info := profile.get(node.get_friendly_name()):
            original = node.get_rt_info()["originalLayersNames"].astype(str).split(",")
            microseconds = info.real_time.total_seconds() * 1e6
            found[info.node_name] = _Executed(info.node_type, info.exec_type, tuple(original), microseconds)
    return found


def _after_warmup(
    before: Mapping[str, _Executed], warmup: int, after: Mapping[str, _Executed], iterations: int
) -> list[_Executed]:
    """The nodes with the mean of the runs after the warm-up: OpenVINO's means start at its very first run.

    They are whole microseconds, so the difference is wrong by up to (warmup + iterations) / iterations of them.
    """
    nodes = []
    for name, node in after.items():
        total = node.microseconds * (warmup + iterations)
        if warmup:
            total -= before[name].microseconds * warmup
        nodes.append(replace(node, microseconds=max(total, 0.0) / iterations))
    return nodes


def _rows(nodes: Sequence[_Executed], seconds: float, graph: onnx.GraphProto) -> list[LayerTime]:
    """A row for each node that takes time or makes a tensor, and one for what is left of `seconds`."""
    rows = [
        LayerTime(outputs, f"{node.kind} {node.kernel}", node.microseconds * 1e-6, sparse=False, kernel_sparsity=None)
        for node, outputs in zip(nodes, covered_outputs(graph, _anchors(nodes, graph)), strict=True)
        if outputs or node.microseconds
    ]
    rest = seconds - sum(row.seconds for row in rows)
    return [*rows, LayerTime((), OUTSIDE, max(rest, 0.0), sparse=False, kernel_sparsity=None)]


def _anchors(nodes: Sequence[_Executed], graph: onnx.GraphProto) -> list[tuple[str, ...]]:
    """The ONNX tensors that each node makes, each of them once.

    OpenVINO names a node after the ONNX node; after the tensor where that is an output of the graph; parts of
    one with a suffix, such as "node_3/WithoutBiases"; and after nothing that we know where it computed new weights.
    Parts of a layer may run by themselves: the layer then belongs to the one that multiplies.
    """
    made = {node.name: tuple(node.output) for node in graph.node}
    made |= {output: (output,) for node in graph.node for output in node.output}
    anchors: list[tuple[str, ...]] = [()] * len(nodes)
    taken: set[str] = set()
    for index in sorted(range(len(nodes)), key=lambda index: nodes[index].kind not in MULTIPLIES):
        names = [made.get(name) or made.get(name.partition("/")[0], ()) for name in nodes[index].original]
        outputs = dict.fromkeys(output for outputs in names for output in outputs if output not in taken)
        taken.update(outputs)
        anchors[index] = tuple(outputs)
    return anchors

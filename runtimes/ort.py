"""ONNX Runtime on the CPU: the dense baseline and the numerical oracle. It has no sparse kernels."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from . import host
from .atomic import WorkFolder
from .base import (
    Arrays,
    Closing,
    Environment,
    LayerTime,
    ModelRefused,
    RuntimeFailure,
    RuntimeUnavailable,
    check_iterations,
    one_line,
    still_open,
)
from .fused_layers import covered_outputs
from .load import WatchesLoad
from .model_file import FixedModel, check_inputs, fix_model
from .workload import Workload

PROVIDERS = ("CPUExecutionProvider",)
OPTIMIZED = "optimized.onnx"
LOG_ERRORS_ONLY = 3
LAYOUT_SUFFIX = "_nchwc"  # ONNX Runtime names a node in its blocked layout after the tensor it makes, plus this
REORDERS = frozenset({"ReorderInput", "ReorderOutput"})
OUTSIDE = "outside the nodes"
NUMBERED = re.compile(r"_token_\d+$")


@dataclass(frozen=True)
class NodeTime:
    """What one node of a profile took, by ONNX Runtime's own clock."""

    seconds: float
    op: str
    provider: str


class OnnxRuntime(WatchesLoad):
    """ONNX Runtime's CPU provider in this process."""

    name = "onnxruntime"
    patterns: frozenset[str] = frozenset()
    usage = """\
import onnxruntime
session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
result = session.run(None, INPUTS)
"""

    def check(self) -> str:
        """The version of ONNX Runtime; raises RuntimeUnavailable where it can't be imported."""
        return str(import_engine().__version__)

    def create_session(self, model: bytes, options: Any) -> Any:
        """See the function of this name."""
        return create_session(model, options)

    def open(
        self,
        model: Path,
        workload: Workload,
        *,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> OrtSession:
        """See `Runtime.open`."""
        version = self.check()
        fixed = fix_model(Path(model), workload, zeros, seed)
        session = self.create_session(fixed.to_bytes(), session_options(workload.threads_or_cores))
        environment = Environment(
            runtime=self.name,
            version=version,
            precision=fixed.precision,
            threads=workload.threads_or_cores,
            batch=workload.batch,
            **host.fields(),
        )
        return OrtSession(session, environment, fixed)

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
        """See `Runtime.layer_seconds`."""
        check_iterations(iterations)
        fixed = fix_model(Path(model), workload, zeros, seed)
        for number, node in enumerate(fixed.proto.graph.node):
            node.name = f"node_{number}"  # the profile identifies nodes by name: make them unique
        with WorkFolder() as made:
            folder = Path(made)
            options = session_options(workload.threads_or_cores)
            options.enable_profiling = True
            options.profile_file_prefix = str(folder / "profile")
            session = self._profiled(fixed.to_bytes(), options, folder, warmup)
            for _ in range(warmup + iterations):
                run_session(session, fixed.inputs)
            profile = Path(session.end_profiling())
            del session  # what it writes when it ends is there now
            try:  # ONNX Runtime doesn't say that it couldn't write them
                events = json.loads(profile.read_text(encoding="utf-8"))
                written = self._written(folder)
            except (OSError, ValueError, DecodeError) as exc:
                raise RuntimeFailure(
                    f"onnxruntime's profile in {folder.parent} is cut off or missing ({one_line(str(exc))}); "
                    "set TMPDIR to a folder with room"
                ) from exc
        nodes, total = _node_times(events, warmup)
        rows = self._rows(nodes, fixed.proto.graph, written)
        rest = total - sum(row.seconds for row in rows)
        return [*rows, LayerTime((), OUTSIDE, max(rest, 0.0), sparse=False, kernel_sparsity=None)]

    def _profiled(self, model: bytes, options: Any, folder: Path, warmup: int) -> Any:
        """A session that is profiled, and what else it shall write into a folder."""
        options.optimized_model_filepath = str(folder / OPTIMIZED)
        return self.create_session(model, options)

    def _written(self, folder: Path) -> Any:
        """What the session wrote beside its profile. Raises OSError, ValueError or DecodeError."""
        return onnx.load(folder / OPTIMIZED, load_external_data=False).graph

    def _rows(self, nodes: Mapping[str, NodeTime], graph: onnx.GraphProto, written: Any) -> list[LayerTime]:
        """A row for each node of the optimized graph that ran."""
        return _optimized_rows(nodes, graph, written)

    def close(self) -> None:
        """Nothing to release: sessions own what they use."""


class OrtSession(Closing):
    """One network in ONNX Runtime."""

    fallback = None

    def __init__(self, session: Any, environment: Environment, fixed: FixedModel) -> None:
        self.environment = environment
        self._session = session
        self._inputs = fixed.inputs
        self._outputs = fixed.outputs

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        check_inputs(inputs, self._inputs)
        return dict(zip(self._outputs, run_session(self._open(), inputs), strict=True))

    def seconds(self, iterations: int, warmup: int = 0) -> list[float]:
        """See `Session.seconds`."""
        session, measured = self._open(), []
        for number in range(warmup + iterations):
            started = perf_counter()
            run_session(session, self._inputs)
            if number >= warmup:
                measured.append(perf_counter() - started)
        return measured

    def close(self) -> None:
        """Drop the compiled network."""
        self._session = None

    def _open(self) -> Any:
        return still_open(self._session)


def session_options(threads: int) -> Any:
    """Options for `threads` threads, each on a core of its own where there are enough cores."""
    options = import_engine().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_ERRORS_ONLY
    # Otherwise the threads of an idle session keep spinning and slow the session that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    cores = host.core_cpus()
    if 1 < threads <= len(cores):
        # The calling thread is the first of the `threads`; ONNX Runtime pins the others, counting CPUs from 1.
        pinned = ";".join(str(cpu + 1) for cpu in cores[1:threads])
        options.add_session_config_entry("session.intra_op_thread_affinities", pinned)
    return options


def create_session(model: bytes, options: Any, providers: Sequence[str] | None = PROVIDERS) -> Any:
    """An `onnxruntime.InferenceSession`; the engine's own exceptions become ModelRefused.

    Args:
        providers: None: those that the options name.
    """
    engine = import_engine()
    try:
        return engine.InferenceSession(model, options, providers=providers)
    except engine_errors() as exc:
        raise ModelRefused(f"onnxruntime refuses the model: {one_line(str(exc))}") from exc


def run_session(session: Any, inputs: Arrays) -> list[np.ndarray]:
    """All outputs of one run; a model that fails at inputs of its own shape becomes ModelRefused."""
    try:
        return session.run(None, inputs)
    except engine_errors() as exc:
        raise ModelRefused(f"onnxruntime can't run the model: {one_line(str(exc))}") from exc


def engine_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which have no base class of their own."""
    state = import_engine().capi.onnxruntime_pybind11_state
    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def import_engine() -> Any:
    """The package onnxruntime; raises RuntimeUnavailable."""
    try:
        import onnxruntime
    except ImportError as exc:
        raise RuntimeUnavailable(f"onnxruntime can't be imported ({one_line(str(exc))}); install onnxruntime") from exc
    return onnxruntime


def _node_times(events: Sequence[Mapping[str, Any]], warmup: int) -> tuple[dict[str, NodeTime], float]:
    """Means over the runs after `warmup`: of each node, by its name, and of the whole network."""
    seconds: dict[str, float] = defaultdict(float)
    current: dict[str, float] = defaultdict(float)
    about: dict[str, Mapping[str, Any]] = {}
    total, runs = 0.0, 0
    for event in events:  # the nodes of a run come before its "model_run"
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            current[name] += event["dur"]
            about[name] = event["args"]
        elif event["name"] == "model_run":
            runs += 1
            if runs > warmup:
                total += event["dur"]
                for name, duration in current.items():
                    seconds[name] += duration
            current.clear()
    scale = 1e-6 / (runs - warmup)
    found = {
        name: NodeTime(value * scale, about[name].get("op_name", ""), about[name].get("provider", ""))
        for name, value in seconds.items()
    }
    return found, total * scale


def _optimized_rows(
    times: Mapping[str, NodeTime], graph: onnx.GraphProto, optimized: onnx.GraphProto
) -> list[LayerTime]:
    made = {node.name: tuple(node.output) for node in graph.node}
    known = {output for outputs in made.values() for output in outputs}
    nodes = [node for node in optimized.node if node.name in times]
    anchors = [tuple(name for name in dict.fromkeys(_made_by(node, made)) if name in known) for node in nodes]
    return [
        LayerTime(outputs, node.op_type, times[node.name].seconds, sparse=False, kernel_sparsity=None)
        for node, outputs in zip(nodes, covered_outputs(graph, anchors), strict=True)
    ]


def _made_by(node: onnx.NodeProto, made: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
    """Names of the tensors that a node of the optimized graph makes, some of them unknown to the original.

    Args:
        made: name of a node of the original -> its outputs.
    """
    if node.op_type in REORDERS:
        return []  # a copy of a tensor that another node made
    if node.name.endswith(LAYOUT_SUFFIX):
        return [node.name.removesuffix(LAYOUT_SUFFIX)]
    # In channels-last layout and in int8 outputs get new names, and nodes at most a number at their own.
    return [*node.output, *made.get(NUMBERED.sub("", node.name), ())]

"""ONNX Runtime with the engine of `runtimes/sparse/`: layers with many zeros run in its kernels, others as ever."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .atomic import WorkFolder
from .base import ANY_ZEROS, LayerTime, ModelRefused, RuntimeFailure, RuntimeUnavailable, check_iterations, one_line
from .fused_layers import covered_outputs
from .model_file import LAYER_OPS, fix_model
from .ort import LAYOUT_SUFFIX, OUTSIDE, OnnxRuntime, engine_errors, import_engine, run_session, session_options
from .workload import Workload

PACKAGE = "onnxruntime-ep-spdy"
KERNEL = "spdy"
NUMBERED_NODE = re.compile(r"node_\d+")


class OnnxRuntimeSparse(OnnxRuntime):
    """ONNX Runtime's CPU provider, and before it the plugin provider of the package `onnxruntime-ep-spdy`."""

    name = "sparse"
    patterns = frozenset({ANY_ZEROS})

    def check(self) -> str:
        """The versions of ONNX Runtime and of the engine; raises RuntimeUnavailable where one can't be imported."""
        engine = super().check()
        _devices()
        return f"{metadata.version(PACKAGE)} in onnxruntime {engine}"

    def create_session(self, model: bytes, options: Any) -> Any:
        """See `OnnxRuntime.create_session`."""
        return self._with_provider(model, options, {})

    def _with_provider(self, model: bytes, options: Any, settings: Mapping[str, str]) -> Any:
        options.add_provider_for_devices(_devices(), dict(settings))
        try:
            return import_engine().InferenceSession(model, options)
        except engine_errors() as exc:
            raise ModelRefused(f"onnxruntime refuses the model: {one_line(str(exc))}") from exc

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
        """See `Runtime.layer_seconds`: the engine's own times of its layers, ONNX Runtime's of all others."""
        check_iterations(iterations)
        fixed = fix_model(Path(model), workload, zeros, seed)
        graph = fixed.proto.graph
        for number, node in enumerate(graph.node):
            node.name = f"node_{number}"  # the profile identifies nodes by name: make them unique
        with WorkFolder() as folder:
            steps = Path(folder) / "steps"
            options = session_options(workload.threads_or_cores)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            settings = {"profile": str(steps), "profile_warmup": str(warmup)}
            session = self._with_provider(fixed.to_bytes(), options, settings)
            for _ in range(warmup + iterations):
                run_session(session, fixed.inputs)
            profile = Path(session.end_profiling())
            del session  # the engine writes its times when it ends
            try:
                events = json.loads(profile.read_text(encoding="utf-8"))
                lines = steps.read_text(encoding="utf-8").splitlines() if steps.exists() else []
                found = [_Step.parse(line) for line in lines]
            except (OSError, ValueError) as exc:
                raise RuntimeFailure(
                    f"onnxruntime's profile in {Path(folder).parent} is cut off or missing ({one_line(str(exc))}); "
                    "set TMPDIR to a folder with room"
                ) from exc
        return _rows(events, warmup, found, graph)


@dataclass(frozen=True)
class _Step:
    """What the engine computes in one go: a layer and what is fused with it, or something between layers."""

    seconds: float
    is_layer: bool
    names: tuple[str, ...]  # tensors that it makes

    @staticmethod
    def parse(line: str) -> _Step:
        seconds, is_layer, *names = line.split("\t")
        return _Step(float(seconds), is_layer == "1", tuple(names))


def _devices() -> list[Any]:
    """The provider's devices; it is registered at the first call."""
    engine = import_engine()
    try:
        import onnxruntime_ep_spdy as sparse
    except ImportError as exc:
        raise RuntimeUnavailable(
            f"the sparse engine can't be imported ({one_line(str(exc))}); pip install {PACKAGE}, from runtimes/sparse"
        ) from exc
    if not hasattr(engine, "get_ep_devices"):
        raise RuntimeUnavailable(f"onnxruntime {engine.__version__} takes no plugin providers; install 1.23 or later")
    try:
        sparse.register()
    except Exception as exc:  # no library in the package, or one that ONNX Runtime can't load
        raise RuntimeUnavailable(f"onnxruntime can't load the sparse engine: {one_line(str(exc))}") from exc
    return [device for device in engine.get_ep_devices() if device.ep_name == sparse.get_ep_name()]


def _rows(
    events: Sequence[Mapping[str, Any]], warmup: int, steps: Sequence[_Step], graph: onnx.GraphProto
) -> list[LayerTime]:
    """A row for each step of the engine and each node of ONNX Runtime, and the remainder."""
    import onnxruntime_ep_spdy as sparse

    total, runs = 0.0, 0
    seconds: dict[str, float] = defaultdict(float)
    current: dict[str, float] = defaultdict(float)
    kinds: dict[str, str] = {}
    for event in events:  # the nodes of a run come before its "model_run"
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            if event["args"].get("provider") != sparse.get_ep_name():
                current[name] += 1e-6 * event["dur"]
                kinds[name] = event["args"].get("op_name", "")
        elif event["name"] == "model_run":
            runs += 1
            if runs > warmup:
                total += 1e-6 * event["dur"]
                for name, duration in current.items():
                    seconds[name] += duration
            current.clear()
    made = {node.name: tuple(node.output) for node in graph.node}
    sparsity = _sparsity(graph)
    of_engine = [step for step in steps if step.names]
    nodes = [*seconds]
    known = {name for outputs in made.values() for name in outputs}
    anchors = [tuple(name for name in step.names if name in known) for step in of_engine]
    anchors += [tuple(name for name in _made_by(node, made) if name in known) for node in nodes]
    covered = covered_outputs(graph, anchors)
    rows = []
    for step, outputs in zip(of_engine, covered, strict=False):
        share = next((sparsity[name] for name in outputs if name in sparsity), None) if step.is_layer else None
        rows.append(LayerTime(outputs, KERNEL, step.seconds, step.is_layer, share))
    for node, outputs in zip(nodes, covered[len(of_engine) :], strict=True):
        rows.append(LayerTime(outputs, kinds[node], seconds[node] / (runs - warmup), False, None))
    rest = total / (runs - warmup) - sum(row.seconds for row in rows)
    return [*rows, LayerTime((), OUTSIDE, max(rest, 0.0), sparse=False, kernel_sparsity=None)]


def _made_by(node: str, made: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Tensors that a node of ONNX Runtime's profile makes; fused ones are named after one of their nodes."""
    if node.endswith(LAYOUT_SUFFIX):
        return (node.removesuffix(LAYOUT_SUFFIX),)
    return tuple(name for number in NUMBERED_NODE.findall(node) for name in made.get(number, ()))


def _sparsity(graph: onnx.GraphProto) -> dict[str, float]:
    """Output of each layer with stored weights -> their share of zeros."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type in LAYER_OPS and len(node.input) > 1 and node.input[1] in stored:
            weight = numpy_helper.to_array(stored[node.input[1]])
            found[node.output[0]] = float(1 - np.count_nonzero(weight) / max(weight.size, 1))
    return found

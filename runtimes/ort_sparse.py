"""ONNX Runtime with the engine of `runtimes/sparse/`: layers with many zeros run in its kernels, others as ever."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .base import ANY_ZEROS, LayerTime, RuntimeUnavailable, one_line
from .fused_layers import covered_outputs
from .model_file import LAYER_OPS
from .ort import LAYOUT_SUFFIX, NodeTime, OnnxRuntime, create_session, import_engine

PACKAGE = "onnxruntime-ep-spdy"
KERNEL = "spdy"
STEPS = "steps"
NUMBERED_NODE = re.compile(r"node_\d+")


class OnnxRuntimeSparse(OnnxRuntime):
    """ONNX Runtime's CPU provider, and before it the plugin provider of the package `onnxruntime-ep-spdy`."""

    name = "sparse"
    patterns = frozenset({ANY_ZEROS, "blockout2", "blockout4"})
    usage = """\
import onnxruntime, onnxruntime_ep_spdy
onnxruntime_ep_spdy.register()
options = onnxruntime.SessionOptions()
devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == onnxruntime_ep_spdy.get_ep_name()]
options.add_provider_for_devices(devices, {})
session = onnxruntime.InferenceSession(MODEL, options)
result = session.run(None, INPUTS)
"""

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
        return create_session(model, options, providers=None)

    def _profiled(self, model: bytes, options: Any, folder: Path, warmup: int) -> Any:
        return self._with_provider(model, options, {"profile": str(folder / STEPS), "profile_warmup": str(warmup)})

    def _written(self, folder: Path) -> list[_Step]:
        """The engine's own times; it writes none where it took no layer."""
        file = folder / STEPS
        return [_Step.parse(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def _rows(self, nodes: Mapping[str, NodeTime], graph: onnx.GraphProto, written: list[_Step]) -> list[LayerTime]:
        """A row for each step of the engine, and for each node that is left to ONNX Runtime."""
        import onnxruntime_ep_spdy as sparse

        made = {node.name: tuple(node.output) for node in graph.node}
        known = {name for outputs in made.values() for name in outputs}
        steps = [step for step in written if step.names]
        left = {name: time for name, time in nodes.items() if time.provider != sparse.get_ep_name()}
        anchors = [tuple(name for name in step.names if name in known) for step in steps]
        anchors += [tuple(name for name in _made_by(node, made) if name in known) for node in left]
        covered = covered_outputs(graph, anchors)
        sparsity = _sparsity(graph)
        rows = []
        for step, outputs in zip(steps, covered, strict=False):
            share = next((sparsity[name] for name in outputs if name in sparsity), None) if step.is_layer else None
            rows.append(LayerTime(outputs, KERNEL, step.seconds, step.is_layer, share))
        for time, outputs in zip(left.values(), covered[len(steps) :], strict=True):
            rows.append(LayerTime(outputs, time.op, time.seconds, sparse=False, kernel_sparsity=None))
        return rows


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

"""Small networks, and a stand-in for the deepsparse package to test the worker without the engine."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.runtimes.deepsparse.client import WORKER, DeepSparse

TENSORRT_STAND_IN = Path(__file__).with_name("nvidia") / "tensorrt_stand_in.py"
ENGINE_PARTS = {
    "__init__.py": """
import os
__version__ = "stub, analytics disabled: " + os.environ.get("NM_DISABLE_ANALYTICS", "unset at import")
os.write(1, b"native noise on file descriptor 1\\n")
""",
    "cpu.py": """
class Architecture(dict):
    num_available_physical_cores = 3
def cpu_architecture():
    return Architecture(isa="avx512", vnni=True, vendor_model="stub CPU")
""",
    "engine.py": """
import hashlib, os, sys, time
import numpy
class Engine:
    input_names, output_names = ["x"], ["y"]
    def __init__(self, path, batch_size, num_cores):
        self.model = open(path, "rb").read()
        if b"refuse me" in self.model:
            raise RuntimeError("NM: error: Failed: /build/x/model.cc:149 ns::Model(const T&) Unsupported\\nthing 7\\n")
        self.num_cores = num_cores or 3
        self.fraction_of_supported_ops = 0.25 if b"fall back" in self.model else 1.0
        if os.environ.get("NM_LOGGING_LEVEL") == "diagnose":
            print("Message: Pad is not constant", file=sys.stderr, flush=True)
    def run(self, inputs):
        if b"be slow" in self.model:
            print("last words", file=sys.stderr, flush=True)
            time.sleep(60)
        return [numpy.ascontiguousarray(inputs[0].sum(axis=(1, 2, 3)))]
def model_debug_analysis(path, inputs, **options):
    digest = hashlib.sha256(open(path, "rb").read()).hexdigest()
    row = dict(name=digest, canonical_name="a", average_run_time_in_ms=1.0, kernel_sparsity=0.5, kernel_dims=[1])
    return {"layer_info": [row]}
""",
}


@pytest.fixture
def conv_net(tmp_path: Path) -> Callable[..., Path]:
    """A writer of x -> Conv -> Relu -> Conv -> GlobalAveragePool -> Flatten -> Gemm -> y; returns the path."""

    def write(*, batch: str | int = "batch", sparsity: float = 0.0, note: str = "", opset: int = 17) -> Path:
        random = np.random.default_rng(1)
        shapes = {"w0": (16, 8, 3, 3), "w1": (24, 16, 3, 3), "w2": (10, 24)}
        weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for weight in weights.values():
            weight[np.abs(weight) < np.quantile(np.abs(weight), sparsity)] = 0
        nodes = [
            helper.make_node("Conv", ["x", "w0"], ["a"], name="first", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"], name="act"),
            helper.make_node("Conv", ["b", "w1"], ["c"], name="second"),
            helper.make_node("GlobalAveragePool", ["c"], ["d"], name="pool"),
            helper.make_node("Flatten", ["d"], ["e"], name="flat"),
            helper.make_node("Gemm", ["e", "w2"], ["y"], name="classify", transB=1),
        ]
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, 12, 12])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
            [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
            doc_string=note,
        )
        opsets = [helper.make_opsetid("", opset)]
        path = tmp_path / f"net_{batch}_{sparsity}_{note.replace(' ', '_')}_{opset}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path

    return write


@pytest.fixture(scope="session")
def tensorrt_stand_in() -> ModuleType:
    """The module tensorrt_stand_in.py."""
    spec = importlib.util.spec_from_file_location("tensorrt_stand_in", TENSORRT_STAND_IN)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_timing_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's."""
    monkeypatch.setenv("ONNX_SPDY_TIMING_CACHE", str(tmp_path_factory.getbasetemp() / "tensorrt.cache"))


@pytest.fixture
def stub_command(tmp_path: Path) -> list[str]:
    """The command line of the real DeepSparse worker with ENGINE_PARTS for an engine."""
    package = tmp_path / "stub" / "deepsparse"
    package.mkdir(parents=True)
    for name, text in ENGINE_PARTS.items():
        (package / name).write_text(text)
    return ["env", "-u", "NM_DISABLE_ANALYTICS", f"PYTHONPATH={package.parent}", sys.executable, str(WORKER)]


@pytest.fixture
def stub_runtime(stub_command: list[str]):
    """A maker of DeepSparse runtimes with that worker."""
    made = []

    def make(**options) -> DeepSparse:
        made.append(DeepSparse(command=stub_command, **options))
        return made[-1]

    yield make
    for runtime in made:
        runtime.close()

# ruff: noqa: T201
"""A stand-in for TensorRT: the parts of its Python package that we call, and of `trtexec` when this file is run.

It computes with ONNX Runtime, fuses a Relu into the layer before, and writes what NVIDIA's documentation says that
TensorRT writes. Of the layers with 2:4 weights it "picks" those named in PICKED.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

VERSION = "10.3.0"
LAYER_MILLISECONDS = 0.25


def is_semi_structured(weight: np.ndarray) -> bool:
    moved = np.moveaxis(weight != 0, 1, -1)
    return moved.shape[-1] % 4 == 0 and (moved.reshape(-1, 4).sum(axis=1) <= 2).all()


def describe(model: onnx.ModelProto) -> tuple[list[dict[str, str]], list[str], list[str]]:
    """Layers as the inspector tells them, names of the eligible ones, and of those that are picked."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    layers, eligible = [], []
    for node in model.graph.node:
        if node.op_type == "Relu" and layers:
            layers[-1]["Name"] += f" + {node.name}"
            layers[-1]["Metadata"] += f"\x1e[ONNX Layer: {node.name}]"
            continue
        layers.append(
            {"Name": node.name, "LayerType": node.op_type, "TacticName": f"sm80_{node.op_type}_kernel",
             "Metadata": f"[ONNX Layer: {node.name}]"}
        )  # fmt: skip
        if node.op_type == "Conv" and node.input[1] in stored and is_semi_structured(stored[node.input[1]]):
            eligible.append(layers[-1])
    names = [layer["Name"] for layer in eligible]
    layers.insert(
        0, {"Name": f"Reformatting CopyNode for Input Tensor 0 to {layers[-1]['Name']}", "LayerType": "Reformat"}
    )
    return layers, names, names[: int(os.environ.get("PICKED", "1"))]


def log_lines(model: onnx.ModelProto) -> list[str]:
    _, eligible, picked = describe(model)
    return [
        f"(Sparsity) Layers eligible for sparse math: {', '.join(eligible)}",
        f"(Sparsity) TRT inference plan picked sparse implementation for layers: {', '.join(picked)}",
    ]


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def package(version: str = VERSION) -> ModuleType:
    """The package."""
    trt = ModuleType("tensorrt")
    trt.__version__ = version

    class ILogger:
        class Severity(IntEnum):
            ERROR, WARNING, INFO, VERBOSE = 1, 2, 3, 4

    class Flags(IntEnum):
        STRONGLY_TYPED = 1

    class Network:
        def __init__(self, flags: int) -> None:
            self.flags, self.model = flags, b""

    class Config:
        def __init__(self) -> None:
            self.flags, self.cache = set(), b""

        def set_flag(self, flag: Enum) -> None:
            self.flags.add(flag)

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            if cache.startswith(b"of another GPU") and not ignore_mismatch:
                return False
            self.cache = cache
            return True

        def get_timing_cache(self):
            grown = self.cache + b"timings;"
            return type("Cache", (), {"serialize": lambda self: grown})()

    class Builder:
        def __init__(self, logger) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Network:
            trt.made = Network(flags)
            return trt.made

        def create_builder_config(self) -> Config:
            trt.config = Config()
            return trt.config

        def build_serialized_network(self, network: Network, config: Config) -> bytes:
            if trt.BuilderFlag.SPARSE_WEIGHTS in config.flags:
                for line in log_lines(onnx.load_from_string(network.model)):
                    self.logger.log(ILogger.Severity.INFO, line)
            self.logger.log(ILogger.Severity.VERBOSE, "a tactic was tried")
            return network.model

    class Parser:
        num_errors = 1

        def __init__(self, network: Network, logger) -> None:
            self.network = network

        def parse(self, model: bytes) -> bool:
            self.network.model = model
            try:
                session(model)
            except Exception:
                return False
            return True

        def get_error(self, number: int):
            return type("Error", (), {"desc": lambda self: "no importer\nfor this operator"})()

    class Context:
        profiler = None

        def __init__(self, engine: Engine) -> None:
            self.engine, self.addresses = engine, {}

        def set_tensor_address(self, name: str, address: int) -> None:
            self.addresses[name] = address

        def execute_async_v3(self, stream: int) -> bool:
            arrays = {name: self.engine.at(name, address) for name, address in self.addresses.items()}
            inputs = [one.name for one in self.engine.session.get_inputs()]
            try:
                outputs = self.engine.session.run(None, {name: arrays[name] for name in inputs})
            except Exception:
                return False
            for one, value in zip(self.engine.session.get_outputs(), outputs, strict=True):
                arrays[one.name][...] = value
            if self.profiler:
                for layer in describe(self.engine.model)[0]:
                    self.profiler.report_layer_time(layer["Name"], LAYER_MILLISECONDS)
            return True

    class Engine:
        def __init__(self, plan: bytes) -> None:
            self.model, self.session = onnx.load_from_string(plan), session(plan)
            self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.num_io_tensors = len(self.tensors)

        def get_tensor_name(self, number: int) -> str:
            return self.tensors[number].name

        def get_tensor_dtype(self, name: str) -> str:
            return next(one.type for one in self.tensors if one.name == name)

        def get_tensor_shape(self, name: str) -> list[int]:
            return next(one.shape for one in self.tensors if one.name == name)

        def at(self, name: str, address: int) -> np.ndarray:
            kind, shape = np.dtype(trt.nptype(self.get_tensor_dtype(name))), self.get_tensor_shape(name)
            count = int(np.prod(shape))
            raw = (ctypes.c_byte * (count * kind.itemsize)).from_address(address)
            return np.frombuffer(raw, kind).reshape(shape)

        def create_engine_inspector(self):
            text = json.dumps({"Layers": describe(self.model)[0], "Bindings": []})
            return type("Inspector", (), {"get_engine_information": lambda self, kind: text})()

        def create_execution_context(self) -> Context:
            return Context(self)

    trt.ILogger, trt.IProfiler = ILogger, type("IProfiler", (), {"__init__": lambda self: None})
    trt.NetworkDefinitionCreationFlag = Flags if version.startswith("10.") else type("Flags", (), {})
    trt.BuilderFlag = Enum("BuilderFlag", "SPARSE_WEIGHTS")
    trt.ProfilingVerbosity = Enum("ProfilingVerbosity", "DETAILED")
    trt.LayerInformationFormat = Enum("LayerInformationFormat", "JSON")
    trt.Builder, trt.OnnxParser = Builder, Parser
    trt.Runtime = lambda logger: type("Runtime", (), {"deserialize_cuda_engine": lambda self, plan: Engine(plan)})()
    trt.nptype = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}.__getitem__
    return trt


def main(arguments: list[str]) -> int:
    """The command."""
    options = {key: value for key, _, value in (one.partition("=") for one in arguments)}
    version = os.environ.get("TRTEXEC_VERSION", "100300")
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec {' '.join(arguments)}")
    if "--onnx" in options:
        path = Path(options["--onnx"])
        model = onnx.load(path)
        if any(node.op_type == "Selu" for node in model.graph.node):
            print("[11/25/2026-10:00:00] [E] [TRT] ModelImporter.cpp:1: no importer for Selu")
            return 1
        print(
            "[11/25/2026-10:00:00] [I] Selected Device: A stand-in\n[11/25/2026-10:00:00] [I] Compute Capability: 9.0"
        )
        for line in log_lines(model):
            print(f"[11/25/2026-10:00:01] [I] [TRT] {line}")
        Path(options["--saveEngine"]).write_bytes(path.read_bytes())
        Path(options["--exportLayerInfo"]).write_text(json.dumps({"Layers": describe(model)[0], "Bindings": []}))
        with Path(options["--timingCacheFile"]).open("ab") as cache:
            cache.write(b"timings;")
    if "--loadEngine" in options:
        plan, count = Path(options["--loadEngine"]).read_bytes(), int(options["--iterations"])
        if "--exportTimes" in options:
            times = [{"startEnqMs": n, "computeMs": 0.5 + n, "latencyMs": 9.0} for n in range(count)]
            Path(options["--exportTimes"]).write_text(json.dumps(times))
        if "--exportProfile" in options:
            layers = describe(onnx.load_from_string(plan))[0]
            entries = [
                {"name": layer["Name"], "timeMs": count * LAYER_MILLISECONDS, "averageMs": LAYER_MILLISECONDS,
                 "medianMs": LAYER_MILLISECONDS, "percentage": 1.0} for layer in layers
            ]  # fmt: skip
            Path(options["--exportProfile"]).write_text(json.dumps([{"count": count}, *entries]))
        if "--exportOutput" in options:
            runner = session(plan)
            kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
            files = dict(one.replace("'", "").split(":") for one in options["--loadInputs"].split(","))
            inputs = {
                one.name: np.fromfile(files[one.name], kinds[one.type]).reshape(one.shape)
                for one in runner.get_inputs()
            }
            names = [one.name for one in runner.get_outputs()]
            outputs = [
                {"name": name, "dimensions": "x".join(map(str, value.shape)), "values": value.flatten().tolist()}
                for name, value in zip(names, runner.run(None, inputs), strict=True)
            ]
            Path(options["--exportOutput"]).write_text(json.dumps(outputs))
    print("&&&& PASSED TensorRT.trtexec")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""DeepSparse, the engine with kernels for unstructured sparsity, in a worker process of its own."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import host
from ..base import (
    Arrays,
    EngineCrashed,
    EngineHung,
    Environment,
    LayerTime,
    ModelRefused,
    RuntimeUnavailable,
    check_iterations,
)
from ..fused_layers import covered_outputs
from ..load import WatchesLoad
from ..model_file import FixedModel, check_inputs, fix_model, prepare_zeros
from ..opset import lower_versions
from ..worker.loop import PROTOCOL, decode_array, encode_array
from ..worker.process import OwnsWorker, WorkerProcess, WorkerSession
from ..worker.uv_command import find_uv
from ..workload import Workload
from .graph import decompose_unsupported
from .log import fallback_reasons

LICENCE_NOTE = (
    "DeepSparse 1.8.0 is licensed for evaluation in development and test only (no production use, no "
    "redistribution) and is no longer developed."
)
PYTHON_VARIABLE = "ONNX_SPDY_DEEPSPARSE_PYTHON"
WORKER = Path(__file__).with_name("worker.py")
MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")
MAX_OPSET, MAX_IR_VERSION = 19, 9
INPUT_OUTPUT_ROWS = 2  # of the inputs and outputs: the only "Naive Subgraph" rows of a fully optimised network

_SOURCE_LOCATION = re.compile(r"(NM: error: )|(/\S+\.(cc|cpp|h|hpp):\d+ .*\) )|(\bwas false\. )")
_ORDINAL = re.compile(r"[_ ]\d+$")


class DeepSparse(OwnsWorker, WatchesLoad):
    """DeepSparse 1.8.0 in a worker that `uv` gives its own Python 3.11 and dependencies.

    Args:
        python: an interpreter that has deepsparse, instead of uv; default: ONNX_SPDY_DEEPSPARSE_PYTHON.
        command: the whole command line of the worker, instead of either.
        download: False takes what uv has from an earlier start, and is unavailable where that is nothing.
        start_seconds: allowed for the worker's start, a first download of the engine included.
        request_seconds: allowed for each answer after that.
    """

    name = "deepsparse"
    patterns = frozenset({"unstructured"})
    usage = """\
import deepsparse
engine = deepsparse.Engine(MODEL, batch_size=len(next(iter(INPUTS.values()))))
result = engine.run([*INPUTS.values()])
"""

    def __init__(
        self,
        *,
        python: str | None = None,
        command: Sequence[str] | None = None,
        download: bool = True,
        start_seconds: float = 900.0,
        request_seconds: float = 600.0,
    ) -> None:
        self._python = python or os.environ.get(PYTHON_VARIABLE)
        self._command = command
        self._download = download
        self._start_seconds = start_seconds
        self._request_seconds = request_seconds

    def check(self) -> str:
        """The engine's version; starts the worker, which takes a second or two once it is installed."""
        self.worker()
        return str(self._hello["version"])

    def open(
        self,
        model: Path,
        workload: Workload,
        *,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> DeepSparseSession:
        """See `Runtime.open`."""
        fixed, _ = _engine_copy(Path(model), workload, zeros)
        worker = self.worker()
        opened = self._ask_with(worker, fixed, "open", workload, zeros=dict(zeros or {}), seed=seed)
        if opened["inputs"] != list(fixed.inputs):
            raise ModelRefused(f"deepsparse takes inputs {opened['inputs']}, the graph has {list(fixed.inputs)}")
        environment = Environment(
            runtime=self.name,
            version=self._hello["version"],
            precision=fixed.precision,
            cpu=self._hello["cpu"],
            instruction_set=self._hello["instruction_set"],
            cores=self._hello["cores"],
            threads=opened["threads"],
            batch=workload.batch,
            host=self._hello["host"],
            options=tuple(sorted(self._hello["options"].items())),
        )
        fallback = None if opened["supported"] >= 1 else self._explain(opened["supported"], fixed, workload)
        return DeepSparseSession(self, worker, opened, environment, fixed, fallback)

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
        """See `Runtime.layer_seconds`. The engine rounds each run's times to microseconds.

        Rows of merged layers don't tell their kernels (sparse=False, kernel_sparsity=None).
        """
        check_iterations(iterations)
        fixed, tensors = _engine_copy(Path(model), workload, zeros)
        answer = self._ask_with(
            self.worker(), fixed, "layers", workload, iterations=iterations, warmup=warmup,
            zeros=dict(zeros or {}), seed=seed, optimization_level=int(merged),
        )  # fmt: skip
        return _layer_times(fixed, tensors, answer["rows"])

    def ask(self, worker: WorkerProcess, op: str, **fields: Any) -> dict[str, Any]:
        """A request with this runtime's time limit; the engine's reasons without its source locations."""
        try:
            return worker.request(op, timeout_seconds=self._request_seconds, **fields)
        except ModelRefused as exc:
            raise ModelRefused(_SOURCE_LOCATION.sub("", str(exc))) from exc

    def _start(self, *arguments: str) -> tuple[WorkerProcess, dict[str, Any]]:
        worker = WorkerProcess(self.name, [*self._command_line(), *arguments], _worker_environment())
        try:
            hello = worker.request("hello", timeout_seconds=self._start_seconds)
            if hello.get("protocol") != PROTOCOL:
                raise RuntimeUnavailable(
                    f"deepsparse's worker speaks version {hello.get('protocol')} of the protocol, this package "
                    f"version {PROTOCOL}; start the worker that belongs to it: {WORKER}"
                )
            return worker, hello
        except (EngineCrashed, EngineHung) as exc:
            raise RuntimeUnavailable(
                f"deepsparse's worker did not start: {str(exc).rstrip('.')}. It needs Python 3.11 and "
                f"deepsparse==1.8.0, which uv downloads once; or name an interpreter that has them in {PYTHON_VARIABLE}"
            ) from exc
        except BaseException:  # an interrupted download, too, must not go on without us
            worker.close()
            raise

    def _command_line(self) -> list[str]:
        if self._command:
            return list(self._command)
        check_machine()
        if self._python:
            return [self._python, str(WORKER)]
        if uv := find_uv():
            offline = [] if self._download else ["--offline"]
            return [uv, "run", "--quiet", *offline, "--script", str(WORKER)]
        raise RuntimeUnavailable(
            f"deepsparse needs uv to get its own Python 3.11; install uv, or name an interpreter that has "
            f"deepsparse==1.8.0 in {PYTHON_VARIABLE}"
        )

    def _ask_with(
        self, worker: WorkerProcess, fixed: FixedModel, op: str, workload: Workload, **fields: Any
    ) -> dict[str, Any]:
        """A request about a model, which the worker is given unless it has it already."""
        model, inputs = worker.supply(fixed.to_bytes(), fixed.inputs.values(), timeout_seconds=self._request_seconds)
        # Where `threads` is None the worker counts the cores.
        return self.ask(
            worker, op, model=model, inputs=inputs, batch=workload.batch, threads=workload.threads, **fields
        )  # fmt: skip

    def _explain(self, supported: float, fixed: FixedModel, workload: Workload) -> str:
        """Open the model once more in a worker that logs its reasons: the level is read at import only."""
        worker, _ = self._start("--diagnose")
        with worker:
            self._ask_with(worker, fixed, "open", workload, zeros={}, seed=0)
        reasons = "; ".join(fallback_reasons(worker.stderr_lines)) or "the engine gives no reason"
        return f"only {supported:.0%} of the operators run optimised, ONNX Runtime runs the rest: {reasons}"


class DeepSparseSession(WorkerSession):
    """One network in the worker."""

    def __init__(
        self,
        runtime: DeepSparse,
        worker: WorkerProcess,
        opened: dict[str, Any],
        environment: Environment,
        fixed: FixedModel,
        fallback: str | None,
    ) -> None:
        super().__init__(worker, runtime.ask, opened["session"], environment, fallback)
        self._inputs = fixed.inputs
        self._outputs = opened["outputs"]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        check_inputs(inputs, self._inputs)
        arrays = [encode_array(inputs[name]) for name in self._inputs]
        answer = self._ask("run", inputs=arrays)
        return {name: decode_array(array) for name, array in zip(self._outputs, answer["outputs"], strict=True)}


def check_machine() -> None:
    """Raise RuntimeUnavailable where DeepSparse can't run, without starting anything."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in MACHINES:
        raise RuntimeUnavailable(
            f"deepsparse runs on x86-64 and aarch64 Linux, this is {system} on {machine}; measure on another machine"
        )
    found = host.instruction_set()
    if machine in ("x86_64", "AMD64") and not found.startswith(("avx512", "avx2")):
        raise RuntimeUnavailable(f"deepsparse needs a CPU with AVX2, this one has {found}; measure on another machine")


def _engine_copy(path: Path, workload: Workload, zeros: Mapping[str, float] | None) -> tuple[FixedModel, set[str]]:
    """The model as the worker gets it, ready for zeros, which are drawn there; and the tensors that nodes of the file
    make: the copy has some of its own.
    """
    fixed = fix_model(path, workload)
    tensors = {output for node in fixed.proto.graph.node for output in node.output}
    prepare_zeros(fixed.proto.graph, zeros)
    decompose_unsupported(fixed.proto)
    lower_versions(fixed.proto, opset=MAX_OPSET, ir_version=MAX_IR_VERSION, engine="deepsparse")
    return fixed, tensors


def _worker_environment() -> dict[str, str]:
    """Ours, without what would lead another Python to our modules."""
    ours = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    # PYTHONSAFEPATH: the files beside the worker must not shadow the modules that the engine imports.
    return ours | {"PYTHONSAFEPATH": "1", "NM_DISABLE_ANALYTICS": "1"}


def _layer_times(fixed: FixedModel, tensors: set[str], rows: list[dict[str, Any]]) -> list[LayerTime]:
    known = {output for node in fixed.proto.graph.node for output in node.output}
    anchors = [tuple(name for name in row["canonical_name"].split(",") if name in known) for row in rows]
    outputs = anchors
    if sum(row["name"].startswith("Naive Subgraph") for row in rows) <= INPUT_OUTPUT_ROWS:
        # With more of them a part fell back, and layers in it belong to no other row.
        outputs = covered_outputs(fixed.proto.graph, anchors)
    return [
        LayerTime(
            outputs=tuple(name for name in covered if name in tensors),
            kernel=_ORDINAL.sub("", row["name"]),
            seconds=row["average_run_time_in_ms"] / 1000,
            sparse=row["name"].startswith("ks_"),
            kernel_sparsity=float(row["kernel_sparsity"]) if row["kernel_dims"] else None,
        )
        for row, covered in zip(rows, outputs, strict=True)
    ]

"""A runtime on another machine: the engine runs and is timed there, and is asked through `ssh`.

Nothing is installed there: this package's sources travel in the first request. Models and samples travel once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base import (
    Arrays,
    EngineCrashed,
    EngineHung,
    Environment,
    LayerTime,
    Runtime,
    RuntimeUnavailable,
    one_line,
)
from ..model_file import read_model, serialized
from ..workload import Workload
from .loop import decode_array, encode_array
from .process import OwnsWorker, WorkerProcess, WorkerSession
from .ssh import PREFIX, PYTHON_VARIABLE, SSH_FAILED, SSH_VARIABLE, Address, first_request, ssh_command


class RemoteRuntime(OwnsWorker):
    """The runtime of an address.

    Args:
        address: where it runs, and what.
        local: the same runtime here, which is never started.
        options: of that runtime's class, as JSON can carry them.
        python: an interpreter there that has what the engine needs, instead of uv; default: ONNX_SPDY_REMOTE_PYTHON.
        command: the whole command line that starts STARTER, instead of ssh's.
        start_seconds: allowed for the start, a first download of the packages included.
        request_seconds: allowed for each answer after that. The engine's own limits hold there; a lost connection is
            noticed by ssh.
    """

    def __init__(
        self,
        address: Address,
        local: Runtime,
        options: Mapping[str, Any],
        *,
        python: str | None = None,
        command: Sequence[str] | None = None,
        start_seconds: float = 900.0,
        request_seconds: float = 3600.0,
    ) -> None:
        self.name = local.name
        self.patterns = local.patterns
        self.usage = local.usage
        self._address = address
        self._options = dict(options)
        self._python = python or os.environ.get(PYTHON_VARIABLE)
        self._command = command
        self._start_seconds = start_seconds
        self._request_seconds = request_seconds

    @property
    def location(self) -> str:
        """The address without the engine."""
        port = f":{self._address.port}" if self._address.port else ""
        return f"{PREFIX}{self._address.target}{port}/"

    @property
    def precision(self) -> str | None:
        """Of a runtime that has a choice of it."""
        return self._options.get("precision")

    def check(self) -> str:
        """The engine's version there; connects."""
        return str(self.ask(self.worker(), "check")["version"])

    def open(
        self,
        model: Path,
        workload: Workload,
        *,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> RemoteSession:
        """See `Runtime.open`."""
        data, worker = _model_bytes(model), self.worker()
        opened = self._ask_with(worker, data, workload, "open", zeros=dict(zeros or {}), seed=seed)
        environment = Environment.from_json(opened["environment"])
        return RemoteSession(worker, self.ask, opened["session"], environment, opened["fallback"])

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
        data, worker = _model_bytes(model), self.worker()
        answer = self._ask_with(
            worker, data, workload, "layers", iterations=iterations, warmup=warmup,
            zeros=dict(zeros or {}), seed=seed, merged=merged,
        )  # fmt: skip
        return [LayerTime(**{**row, "outputs": tuple(row["outputs"])}) for row in answer["rows"]]

    def foreign_cores(self) -> float | None:
        """See `Runtime.foreign_cores`; of that machine."""
        return self.ask(self.worker(), "foreign_cores")["cores"]

    def ask(self, worker: WorkerProcess, op: str, **fields: Any) -> dict[str, Any]:
        """A request with this runtime's time limit; a lost connection is told as one."""
        with self._telling_loss(worker, op):
            return worker.request(op, timeout_seconds=self._request_seconds, **fields)

    def _ask_with(
        self, worker: WorkerProcess, model: bytes, workload: Workload, op: str, **fields: Any
    ) -> dict[str, Any]:
        """A request about a model, which is sent unless it is there already."""
        given = dict(workload.inputs or {})
        with self._telling_loss(worker, op):
            sha256, arrays = worker.supply(model, given.values(), timeout_seconds=self._request_seconds)
        inputs = dict(zip(given, arrays, strict=True))
        return self.ask(
            worker, op, model=sha256, inputs=inputs, batch=workload.batch, threads=workload.threads, **fields
        )  # fmt: skip

    @contextlib.contextmanager
    def _telling_loss(self, worker: WorkerProcess, op: str) -> Iterator[None]:
        try:
            yield
        except EngineCrashed as exc:
            if worker.exit_code == SSH_FAILED:
                raise EngineCrashed(f"{self._lost(worker)} during {op!r}; open the model again") from exc
            raise

    def _start(self) -> tuple[WorkerProcess, dict[str, Any]]:
        command = list(self._command or ssh_command(self._address, self._python))
        if not shutil.which(command[0]):
            raise RuntimeUnavailable(
                f"{self._address}: there is no {command[0]!r} here; install an OpenSSH client, or name one in "
                f"{SSH_VARIABLE}"
            )
        worker = WorkerProcess(str(self._address), command)
        try:
            return worker, worker.request(
                "hello",
                timeout_seconds=self._start_seconds,
                engine=self._address.engine,
                options=self._options,
                **first_request(self._options.get("reader")),
            )
        except (EngineCrashed, EngineHung) as exc:
            raise RuntimeUnavailable(self._not_started(worker, str(exc).rstrip("."))) from exc
        except BaseException:  # an interrupted download, too, must not go on without us
            worker.close()
            raise

    def _not_started(self, worker: WorkerProcess, problem: str) -> str:
        if worker.exit_code == SSH_FAILED:
            port = f"-p {self._address.port} " if self._address.port else ""
            return f"{self._lost(worker)}; 'ssh {port}{self._address.target}' must work without a question"
        if self._python:
            return f"{problem}. {self._python!r} needs Python 3.10 or later with onnx, psutil and what the engine needs"
        return (
            f"{problem}. That machine needs uv (docs.astral.sh/uv), which gets what the engine needs; or name an "
            f"interpreter there that has it in {PYTHON_VARIABLE}"
        )

    def _lost(self, worker: WorkerProcess) -> str:
        return f"{self._address}: no connection ({one_line(worker.last_line()).rstrip('.') or 'ssh gives no reason'})"


class RemoteSession(WorkerSession):
    """One network in a runtime on another machine."""

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        answer = self._ask("run", inputs={name: encode_array(array) for name, array in inputs.items()})
        return {name: decode_array(array) for name, array in answer["outputs"].items()}


def _model_bytes(path: Path) -> bytes:
    """The file with its weights in it. It is read here first: what is wrong with a file is told by its own name."""
    return serialized(read_model(Path(path)))

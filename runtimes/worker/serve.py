"""The far end of `remote.py`: any registered runtime, asked through stdin and stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..atomic import WORK, hold_folder, remove_left
from ..base import Runtime, Session
from ..registry import open_runtime
from ..workload import Workload
from .loop import PROTOCOL, Kept, answer_all, decode_array, encode_array
from .process import ERROR_KINDS

if TYPE_CHECKING:
    from .loop import Operation

STOP_SECONDS = 10.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

Request = Mapping[str, Any]


def main(hello: Request, folder: str) -> None:
    """Serve the runtime that `hello` names until stdin ends; every temporary file is made below `folder`."""
    tempfile.tempdir = os.environ["TMPDIR"] = folder  # also of engines, which aren't written in Python
    hold_folder(folder)
    remove_left(Path(folder).parent, f"{WORK}*")
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        with open_runtime(hello["engine"], **_options(hello["engine"], hello["options"])) as runtime:
            server = Server(runtime, Path(folder))
            at_end = partial(_end, threading.get_ident(), folder)
            answer_all(server.operations, at_end=at_end, kind_of=error_kind, first=[hello])
    except SystemExit:  # by `_stop`
        return


class Server:
    """The operations on one runtime."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._runtime = runtime
        self._folder = folder
        self._kept = Kept()
        self._sessions: dict[int, Session] = {}
        self._numbers = itertools.count(1)
        self.operations: dict[str, Operation] = {
            "hello": self._hello,
            "check": self._check,
            "missing": self._kept.missing,
            "keep": self._kept.keep,
            "open": self._open,
            "run": self._run,
            "seconds": self._seconds,
            "layers": self._layers,
            "foreign_cores": self._foreign_cores,
            "close": self._close,
        }

    def _hello(self, request: Request) -> Request:
        return {"protocol": PROTOCOL, "host": platform.node(), "python": platform.python_version(), "pid": os.getpid()}

    def _check(self, request: Request) -> Request:
        return {"version": self._runtime.check()}

    def _open(self, request: Request) -> Request:
        with self._model(request) as (path, workload):
            session = self._runtime.open(path, workload, zeros=request["zeros"], seed=request["seed"])
        number = next(self._numbers)
        self._sessions[number] = session
        return {"session": number, "environment": session.environment.to_json(), "fallback": session.fallback}

    def _run(self, request: Request) -> Request:
        inputs = {name: decode_array(array) for name, array in request["inputs"].items()}
        outputs = self._sessions[request["session"]].run(inputs)
        return {"outputs": {name: encode_array(array) for name, array in outputs.items()}}

    def _seconds(self, request: Request) -> Request:
        return {"seconds": self._sessions[request["session"]].seconds(request["iterations"], request["warmup"])}

    def _layers(self, request: Request) -> Request:
        profile = {name: request[name] for name in ("iterations", "warmup", "zeros", "seed", "merged")}
        with self._model(request) as (path, workload):
            rows = self._runtime.layer_seconds(path, workload, **profile)
        return {"rows": [dataclasses.asdict(row) for row in rows]}

    def _foreign_cores(self, request: Request) -> Request:
        return {"cores": self._runtime.foreign_cores()}

    def _close(self, request: Request) -> Request:
        self._sessions.pop(request["session"]).close()
        return {}

    @contextlib.contextmanager
    def _model(self, request: Request) -> Iterator[tuple[Path, Workload]]:
        """The request's model as a file, and its workload."""
        inputs = {name: decode_array(array, self._kept) for name, array in request["inputs"].items()}
        path = self._folder / "model.onnx"
        path.write_bytes(self._kept[request["model"]])
        try:
            yield path, Workload(request["batch"], request["threads"], inputs)
        finally:
            path.unlink()


def error_kind(exc: Exception) -> str:
    """The kind under which an error travels: it arrives as the class that it left as, or as RuntimeFailure."""
    return next((kind for kind, error in ERROR_KINDS.items() if isinstance(exc, error)), "failed")


def _options(engine: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime's options; an interpreter that has DeepSparse is its worker's, and uv isn't needed."""
    if engine == "deepsparse" and importlib.util.find_spec("deepsparse"):
        return {"python": sys.executable, **options}
    return dict(options)


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind the main thread, which closes the runtime; once."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(0)


def _end(main_thread: int, folder: str) -> None:
    """The other machine is gone: stop the main thread, whatever it does; where it can't stop, end without it."""
    signal.pthread_kill(main_thread, signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)

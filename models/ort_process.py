"""Run graphs in ONNX Runtime without trusting them: one that makes it abort or hang ends another process."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnx_spdy.models.graph import ModelError, one_line
from onnx_spdy.models.stored import is_mapped, place_of, values_of
from onnx_spdy.runtimes.atomic import WorkFolder

LONGEST_RUN_SECONDS = 60
LONGEST_LOAD_SECONDS = 600
GRACE_SECONDS = 10  # for a run to end by itself when it is told to


class RunFailed(ModelError):
    """ONNX Runtime gave an error for these inputs; with others the model may run."""


# Where the process finds an array: a .npy file, or {"path", "offset", "dtype", "shape"} of values in another.
Found = Path | dict[str, Any]
PLAIN_KINDS = "biuf"  # of element types that NumPy itself has


class OrtProcess:
    """A process with ONNX Runtime, for graphs that it may not survive. Used as a context manager.

    Starting it returns at once; it takes 0.2 s, which the first request waits for. After a crash the next request
    starts it again, with no graph loaded.
    """

    def __init__(self) -> None:
        self._folder = WorkFolder()
        self._words = (Path(self._folder.name) / "stderr").open("w+b")
        self._process = self._start()
        self._numbers = itertools.count()
        self._what = ""

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ort_worker.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True,
        )  # fmt: skip

    def __enter__(self) -> OrtProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        self._words.close()
        self._folder.cleanup()

    def _end(self) -> int:
        """Its exit code, or the signal that ended it as a negative number."""
        self._process.kill()
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]
        return code

    def load(self, model: onnx.ModelProto, what: str, *, optimise: bool = False) -> None:
        """Make this graph, which is called `what` in messages, the one that runs.

        Raises:
            ModelError: ONNX Runtime can't load it, or crashes.
        """
        self._what = what
        path = Path(self._folder.name) / "model.onnx"
        with self._writing():
            path.write_bytes(model.SerializeToString())
        answer = self._ask({"model": str(path), "optimise": optimise}, "loads", LONGEST_LOAD_SECONDS)
        if "error" in answer:
            reason = one_line(answer["error"].replace(f"Load model from {path} failed:", ""))
            raise ModelError(f"ONNX Runtime can't load {what}: {reason}")

    def place(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Path]:
        """Arrays as files that the process reads, by name.

        Raises:
            ModelError: there is no room for them.
        """
        paths = {name: Path(self._folder.name) / f"{next(self._numbers)}.npy" for name in arrays}
        with self._writing():
            for name, path in paths.items():
                np.save(path, arrays[name], allow_pickle=False)
        return paths

    def place_weights(self, weights: Sequence[TensorProto]) -> dict[str, Found]:
        """The same for stored tensors; those that are mapped are read from their own file.

        Raises:
            ModelError: there is no room for them.
        """
        found: dict[str, Found] = {}
        for tensor in weights:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            if is_mapped(tensor) and dtype.kind in PLAIN_KINDS:
                place = place_of(tensor)
                found[tensor.name] = {
                    "path": str(place.path), "offset": place.offset, "dtype": dtype.str, "shape": [*tensor.dims]
                }  # fmt: skip
            else:
                found |= self.place({tensor.name: values_of(tensor)})
        return found

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise self._no_room(exc.strerror or str(exc)) from exc

    def _no_room(self, reason: str) -> ModelError:
        return ModelError(
            f"cannot write the model to {Path(self._folder.name).parent}, to try it in another process: "
            f"{one_line(reason)}; set TMPDIR to a folder with room"
        )

    def run(self, inputs: Mapping[str, Found]) -> list[np.ndarray]:
        """Outputs of the loaded graph for inputs that were placed.

        Raises:
            RunFailed: ONNX Runtime gives an error.
            ModelError: it takes more than LONGEST_RUN_SECONDS (a loop may have no end), or crashes.
        """
        with tempfile.TemporaryDirectory(dir=self._folder.name) as outputs:
            paths = {name: one if isinstance(one, dict) else str(one) for name, one in inputs.items()}
            request = {"inputs": paths, "outputs": outputs, "seconds": LONGEST_RUN_SECONDS}
            answer = self._ask(request, "runs", LONGEST_RUN_SECONDS + GRACE_SECONDS)
            if "late" in answer:
                raise ModelError(f"one run of {self._what} takes more than {LONGEST_RUN_SECONDS} s in ONNX Runtime")
            if "unwritten" in answer:
                raise self._no_room(answer["unwritten"])
            if "error" in answer:
                raise RunFailed(f"ONNX Runtime can't run {self._what}: {one_line(answer['error'])}")
            arrays = [np.load(Path(outputs) / f"{number}.npy") for number in range(len(answer["dtypes"]))]
            return [array.astype(dtype, copy=False) for array, dtype in zip(arrays, answer["dtypes"], strict=True)]

    def _ask(self, request: Mapping[str, Any], does: str, seconds: float) -> dict[str, Any]:
        if self._process.poll() is not None:
            self._end()
            self._process = self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._limit(seconds) as late, contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if line := self._process.stdout.readline():
                return json.loads(line)
        if late.is_set():
            self._end()
            raise ModelError(f"ONNX Runtime takes more than {seconds:g} s when it {does} {self._what}: stopped")
        raise ModelError(
            f"ONNX Runtime crashes when it {does} {self._what} ({self._ending()}): "
            "the graph is damaged, or holds what this version can't take; export the model again"
        )

    @contextlib.contextmanager
    def _limit(self, seconds: float) -> Iterator[threading.Event]:
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()

    def _ending(self) -> str:
        """How the process ended, and its last words."""
        self._process.wait()
        code = self._end()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return one_line(f"{how}: {lines[-1]}") if lines else how

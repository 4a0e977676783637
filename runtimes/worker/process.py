"""The transport to an engine in a process of its own: JSON lines on its stdin and stdout.

The process is a command line, and everything travels through the two pipes, models included, so it
may as well run on another machine: `ssh HOST COMMAND` is only another command.

    request   {"id": 7, "op": "seconds", ...fields}
    reply     {"id": 7, "result": {...}}   or   {"id": 7, "error": {"kind": "refused", "message": "..."}}

Models and samples are sent once: requests name them by their sha256, see `supply`. `loop.py` has the far end.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..base import (
    Closing,
    EngineCrashed,
    EngineHung,
    Environment,
    ModelRefused,
    RuntimeFailure,
    RuntimeUnavailable,
    one_line,
    still_open,
)
from ..workload import WorkloadError

ERROR_KINDS: dict[str, type[Exception]] = {
    "refused": ModelRefused,
    "unavailable": RuntimeUnavailable,
    "crashed": EngineCrashed,
    "hung": EngineHung,
    "workload": WorkloadError,
    "value": ValueError,
    "failed": RuntimeFailure,
}
STOP_SECONDS = 5.0
STDERR_LINES = 50_000  # a diagnostic log of a large network stays whole


class WorkerProcess(Closing):
    """One worker; made for one thread. After any failure but an error reply it is dead."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start `command`; `name` is how messages call it.

        Raises:
            RuntimeUnavailable: the command can't be started.
        """
        self.name = name
        self.sent_bytes = 0
        self.stderr_lines: deque[str] = deque(maxlen=STDERR_LINES)
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(environment) if environment is not None else None,
                start_new_session=True,  # so that a launcher such as uv is killed with what it launched
            )
        except OSError as exc:
            raise RuntimeUnavailable(f"{name}: can't start {command[0]!r}: {exc}") from exc
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._last_id = 0
        self._released = False
        self._threads = [
            threading.Thread(target=target, name=f"{name}-{target.__name__}", daemon=True)
            for target in (self._write_requests, self._read_replies, self._read_stderr)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Process id of the command, which leads a process group of its own."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """The process runs and may be asked."""
        return not self._released and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The command's return code, negative for a signal; None while it runs."""
        return self._process.poll()

    def request(self, op: str, *, timeout_seconds: float, **fields: Any) -> dict[str, Any]:
        """Ask for one thing and wait for its result.

        Raises:
            RuntimeFailure, ValueError: the error that the worker replies with, or, after which the worker is dead:
            EngineCrashed: the process died, had died before, or wrote something that is no reply.
            EngineHung: no reply within `timeout_seconds`.
        """
        if self._released:
            raise EngineCrashed(f"{self.name}'s process has ended, and its sessions with it; open the model again")
        self._last_id += 1
        deadline = time.monotonic() + timeout_seconds
        line = json.dumps({"id": self._last_id, "op": op, **fields}).encode() + b"\n"
        self.sent_bytes += len(line)
        self._requests.put(line)
        while True:
            try:
                answer = self._replies.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                self.kill()
                raise EngineHung(
                    f"{self.name} gave no answer to {op!r} within {timeout_seconds:g} s and was killed; "
                    f"allow it more time if the network is that slow"
                ) from None
            if answer is None:
                raise EngineCrashed(self._last_words(op))
            reply = _parse(answer)
            if reply is None:
                self.kill()
                raise EngineCrashed(
                    f"{self.name} wrote something that is no reply to {op!r} and was killed: "
                    f"{one_line(answer.decode(errors='replace'), 120)!r}"
                )
            if reply["id"] != self._last_id:
                continue  # the answer to a request whose caller was interrupted
            if "error" in reply:
                raise ERROR_KINDS[reply["error"]["kind"]](f"{self.name}: {one_line(reply['error']['message'])}")
            return reply["result"]

    def supply(
        self, model: bytes, samples: Iterable[np.ndarray], *, timeout_seconds: float
    ) -> tuple[str, list[dict[str, Any]]]:
        """Make a model and samples known to the worker, sending what it does not have.

        Returns:
            What the next request calls them: the model's sha256, and for each array its type, shape and sha256.
        Raises:
            As `request`.
        """
        arrays = list(samples)
        values = [model, *(array.tobytes() for array in arrays)]
        names = [hashlib.sha256(value).hexdigest() for value in values]
        by_name = dict(zip(names, values, strict=True))
        missing = self.request("missing", timeout_seconds=timeout_seconds, sha256s=list(by_name))["sha256s"]
        for name in missing:
            data = base64.b64encode(by_name[name]).decode("ascii")
            self.request("keep", timeout_seconds=timeout_seconds, sha256=name, data=data)
        return names[0], [
            {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": name}
            for array, name in zip(arrays, names[1:], strict=True)
        ]

    def last_line(self) -> str:
        """The last line on its stderr that isn't empty, or ""."""
        return next((line.strip() for line in reversed(tuple(self.stderr_lines)) if line.strip()), "")

    def kill(self) -> None:
        """End the process and everything it launched, at once."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._release()

    def close(self) -> None:
        """Let the process end by closing its stdin; kill it if it does not."""
        if self._released:
            return
        self._requests.put(None)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._release()

    def _release(self) -> None:
        self._process.wait()
        self._requests.put(None)
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            try:
                if pipe:
                    pipe.close()
            except BrokenPipeError:
                continue  # the end of a request that the process did not live to read
        self._released = True

    def _last_words(self, op: str) -> str:
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"{self.name} closed its stdout during {op!r} and was killed"
        self._release()
        words = one_line(self.last_line(), 200)
        return f"{self.name} died during {op!r}: {describe_exit(code)}" + (
            f"; its last words: {words}" if words else ""
        )

    def _write_requests(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (line := self._requests.get()) is not None:
                pipe.write(line)
                pipe.flush()
            pipe.close()
        except OSError:
            return  # the process has ended: the reader of replies sees it and reports it

    def _read_replies(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        for line in pipe:
            self._replies.put(line)
        self._replies.put(None)

    def _read_stderr(self) -> None:
        pipe = self._process.stderr
        assert pipe is not None
        for line in pipe:
            self.stderr_lines.append(line.decode(errors="replace").rstrip("\n"))


class OwnsWorker(Closing):
    """A runtime's one worker, started when it is first needed, and again where it died."""

    _process: WorkerProcess | None = None
    _hello: Mapping[str, Any] = {}  # what the worker says of itself

    def worker(self) -> WorkerProcess:
        """The running worker; starts one if there is none, or if the last one died."""
        if self._process and self._process.alive:
            return self._process
        self.close()
        self._process, self._hello = self._start()
        return self._process

    def close(self) -> None:
        """End the worker, and every session with it."""
        if self._process:
            self._process.close()
        self._process = None

    def _start(self) -> tuple[WorkerProcess, dict[str, Any]]:
        raise NotImplementedError(f"{type(self).__name__} doesn't say how its worker starts")


class WorkerSession(Closing):
    """One network that a worker holds; a subclass says how samples travel.

    Args:
        worker: where it is.
        ask: called with (worker, op, **fields): a request as the runtime makes it.
        session: its number there.
        environment, fallback: see `Session`.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        ask: Callable[..., dict[str, Any]],
        session: int,
        environment: Environment,
        fallback: str | None,
    ) -> None:
        self.environment = environment
        self.fallback = fallback
        self._worker = worker
        self._ask_worker = ask
        self._session: int | None = session

    def seconds(self, iterations: int, warmup: int = 0) -> list[float]:
        """See `Session.seconds`; timed there."""
        return list(self._ask("seconds", iterations=iterations, warmup=warmup)["seconds"])

    def close(self) -> None:
        """Release the network there."""
        if self._session is not None and self._worker.alive:
            self._ask("close")
        self._session = None

    def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        return self._ask_worker(self._worker, op, session=still_open(self._session), **fields)


def describe_exit(code: int) -> str:
    """Words for a return code: a signal's name, also where a launcher reports it as 128 + signal."""
    number = -code if code < 0 else code - 128
    if number in {item.value for item in signal.Signals}:
        return f"killed by {signal.Signals(number).name}"
    return f"exit code {code}"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The reply in a line, or None if it isn't one."""
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    if not isinstance(reply, dict) or "id" not in reply or not ("result" in reply or "error" in reply):
        return None
    return reply

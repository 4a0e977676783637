"""TensorRT through its command `trtexec`, for those who have no Python package of it. Not run on hardware yet."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from .. import host
from ..base import Arrays, EngineHung, ModelRefused, RuntimeUnavailable, one_line
from .trt_log import (
    ProfiledLayer,
    UnreadableLog,
    exported_outputs,
    exported_profile,
    exported_times,
    logged_device,
    logged_version,
)

TIMEOUT_SECONDS = 3600.0  # a build tries many kernels
OLDEST = 10


class TrtExec:
    """A `trtexec`; see `Backend` in trt.py."""

    def __init__(self, command: str) -> None:
        self._command = command

    def check(self) -> str:
        """Its version of TensorRT; raises RuntimeUnavailable where it doesn't start or is too old."""
        try:
            version = logged_version(self.call("--help"))
        except (OSError, UnreadableLog, ModelRefused) as exc:
            raise RuntimeUnavailable(f"{self._command} is no trtexec that works ({one_line(str(exc))})") from exc
        if int(version.partition(".")[0]) < OLDEST:
            raise RuntimeUnavailable(f"{self._command} is of TensorRT {version}; {OLDEST} or later is needed")
        return version

    def build(self, model: Path, cache: Path) -> TrtExecEngine:
        """An engine of an ONNX file that carries its precision."""
        folder = model.parent
        typed = (
            ["--stronglyTyped"] if int(self.check().partition(".")[0]) < 11 else []
        )  # from 11 on there is nothing else
        log = self.call(
            f"--onnx={model}", f"--saveEngine={folder / 'engine'}", *typed, "--sparsity=enable",
            "--profilingVerbosity=detailed", f"--timingCacheFile={cache}",
            f"--exportLayerInfo={folder / 'layers.json'}", "--skipInference",
        )  # fmt: skip
        return TrtExecEngine(self, folder, log)

    def call(self, *arguments: str) -> str:
        """All that it prints.

        Raises:
            ModelRefused: it failed; its last error.
            EngineHung: it took too long.
        """
        try:
            done = subprocess.run(
                [self._command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", timeout=TIMEOUT_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as exc:
            raise EngineHung(f"trtexec gave no result within {TIMEOUT_SECONDS:.0f} s and was stopped") from exc
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "[E]" in line] or done.stdout.splitlines()[-1:]
            raise ModelRefused(f"trtexec failed with {done.returncode}: {one_line(' '.join(errors[:2]))}")
        return done.stdout


class TrtExecEngine:
    """An engine file; each question to it is a process. See `Engine` in trt.py."""

    def __init__(self, trtexec: TrtExec, folder: Path, log: str) -> None:
        self._trtexec, self._folder, self.log = trtexec, folder, log
        self.layers = (folder / "layers.json").read_text(encoding="utf-8")

    def fields(self) -> dict[str, Any]:
        """What an `Environment` says of the GPU."""
        name, capability = logged_device(self.log)
        instructions = f"sm_{capability.replace('.', '')}"
        return {**host.fields(), "cpu": name, "instruction_set": instructions, "options": (("by", "trtexec"),)}

    def run(self, inputs: Arrays, outputs: dict[str, np.dtype]) -> dict[str, np.ndarray]:
        """Outputs by name, of these types."""
        loads, exported = [], self._folder / "outputs.json"
        for number, (name, array) in enumerate(inputs.items()):
            path = self._folder / f"input_{number}.bin"
            path.write_bytes(np.ascontiguousarray(array).tobytes())
            loads.append(f"'{name}':{path}")
        self._trtexec.call(
            self._load(), f"--loadInputs={','.join(loads)}", f"--exportOutput={exported}", *self._runs(1)
        )
        return exported_outputs(exported.read_text(encoding="utf-8"), outputs)

    def seconds(self, inputs: Arrays, iterations: int, warmup: int) -> list[float]:
        """(iterations,) seconds on the GPU, of random inputs."""
        times = self._folder / "times.json"
        options = ("--useCudaGraph", "--noDataTransfers", "--useSpinWait", f"--exportTimes={times}")
        self._trtexec.call(self._load(), *self._runs(warmup + iterations), *options)
        found = exported_times(times.read_text(encoding="utf-8"))[-iterations:]
        if len(found) < iterations:
            raise UnreadableLog(f"trtexec told {len(found)} times, {iterations} were asked for")
        return found

    def profile(self, inputs: Arrays, iterations: int, warmup: int) -> list[ProfiledLayer]:
        """Mean seconds of the layers, warm-up included: trtexec doesn't part them."""
        profile = self._folder / "profile.json"
        self._trtexec.call(self._load(), *self._runs(warmup + iterations), f"--exportProfile={profile}")
        return exported_profile(profile.read_text(encoding="utf-8"))

    def close(self) -> None:
        """Nothing runs between questions."""

    def _load(self) -> str:
        return f"--loadEngine={self._folder / 'engine'}"

    @staticmethod
    def _runs(count: int) -> tuple[str, ...]:
        return f"--iterations={count}", "--avgRuns=1", "--warmUp=200", "--duration=0"

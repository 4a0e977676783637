"""Which runtimes work on this machine, and what to do where one does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from onnx_spdy.pipeline.engine import open_runtime
from onnx_spdy.pipeline.level import Level
from onnx_spdy.runtimes import ANY_ZEROS, DEEPSPARSE_LICENCE_NOTE, RUNTIMES, Runtime, RuntimeFailure

NOT_ON_HARDWARE = "not run on hardware yet"
NOTES = {
    "cusparselt": "dense or 2:4 on NVIDIA GPUs from compute capability 8.0 on, in PyTorch; run on an H200",
    "deepsparse": DEEPSPARSE_LICENCE_NOTE,
    "fake": "a formula of the non-zeros, not an engine: for tests and dry runs",
    "onnxruntime": "no sparse kernels: a dense baseline",
    "openvino": "no sparse kernels for unstructured sparsity: a dense baseline in fp32 and bf16",
    "sparse": "layers with many zeros in the kernels of runtimes/sparse, inside ONNX Runtime",
    "tensorrt": f"dense or 2:4 on NVIDIA GPUs from compute capability 8.0 on; {NOT_ON_HARDWARE}",
}
NO_ENGINE = "fake"


@dataclass(frozen=True)
class Finding:
    """One runtime: works with `version`, or `problem` says why not and what to do.

    Attributes:
        patterns: of zeros that it has kernels for, in order.
    """

    name: str
    version: str | None
    problem: str | None
    patterns: tuple[str, ...]
    note: str


def examine() -> list[Finding]:
    """Try every runtime."""
    findings = []
    for name in sorted(RUNTIMES):
        with open_runtime(name) as runtime:
            version: str | None = None
            problem: str | None = None
            try:
                version = runtime.check()
            except RuntimeFailure as exc:
                problem = str(exc)
            findings.append(Finding(name, version, problem, tuple(sorted(runtime.patterns)), NOTES.get(name, "")))
    return findings


def with_kernels_for(pattern: str) -> list[str]:
    """Names of the engines that have kernels for a pattern, whether they work here or not."""
    return [name for name in sorted(RUNTIMES) if name != NO_ENGINE and pattern in open_runtime(name).patterns]


def warn_without_kernels(engine: Runtime, levels: Sequence[Level]) -> None:
    """Say which of these patterns the runtime has no kernels for; a narrower network needs none."""
    zeros = {level.pattern for level in levels if not level.is_width and not level.is_whole}
    for pattern in sorted(zeros - engine.patterns):
        if ANY_ZEROS in engine.patterns:
            message = "takes its zeros as it takes any others: what they gain depends on how many there are"
        else:
            message = "zeros don't make it faster, expect no speedup; --pattern channels is faster in any runtime"
        others = with_kernels_for(pattern)
        message += f"; {', '.join(others)} {'has' if len(others) == 1 else 'have'} them" if others else ""
        Console(stderr=True).print(f"warning: {engine.name} has no kernels for {pattern}: {message}", style="yellow")

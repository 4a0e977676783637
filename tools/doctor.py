"""Which runtimes work on this machine, and what to do where one does not."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_spdy.runtimes import DEEPSPARSE_LICENCE_NOTE, RUNTIMES, RuntimeFailure, open_runtime

NOTES = {
    "deepsparse": DEEPSPARSE_LICENCE_NOTE,
    "fake": "a formula of the non-zeros, not an engine: for tests and dry runs",
    "onnxruntime": "no sparse kernels: a dense baseline",
    "openvino": "no sparse kernels for unstructured sparsity: a dense baseline in fp32 and bf16",
}


@dataclass(frozen=True)
class Finding:
    """One runtime: works with `version`, or `problem` says why not and what to do."""

    name: str
    version: str | None
    problem: str | None
    sparse: bool
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
            findings.append(Finding(name, version, problem, runtime.sparse, NOTES.get(name, "")))
    return findings

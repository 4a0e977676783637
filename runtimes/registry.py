"""The runtimes by name: one line each. Those with a choice of precision take it after a colon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .base import Runtime, UnknownRuntime
from .deepsparse.client import DeepSparse
from .fake import FakeRuntime
from .nvidia.cusparselt import CuSparseLt
from .nvidia.trt import TensorRt
from .ort import OnnxRuntime
from .ort_sparse import OnnxRuntimeSparse
from .vino import OpenVino
from .worker.remote import RemoteRuntime
from .worker.ssh import PREFIX, Address

RUNTIMES: dict[str, Callable[..., Runtime]] = {
    "cusparselt": CuSparseLt,
    "deepsparse": DeepSparse,
    "fake": FakeRuntime,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "sparse": OnnxRuntimeSparse,
    "tensorrt": TensorRt,
}
WITH_PRECISION = frozenset({"cusparselt", "openvino", "tensorrt"})
IN_PYTORCH = frozenset({"cusparselt"})  # these take `reader`, which names what makes a module of an ONNX file


def open_runtime(spec: str, **options: Any) -> Runtime:
    """A runtime by name; its engine starts, and another machine is connected, at the first call.

    Args:
        spec: a key of RUNTIMES; for those in WITH_PRECISION maybe a colon and a precision: "openvino:bf16". With
            ssh://[USER@]HOST[:PORT]/ before it, that runtime on another machine.
        options: of that runtime's class, such as `seconds_per_mac` for "fake". With ssh:// `python` is an
            interpreter on that machine, see `RemoteRuntime`.
    Raises:
        UnknownRuntime: no such name, or one that has no choice of precision.
        ValueError: no such precision; the message lists those there are.
    """
    if spec.startswith(PREFIX):
        address, python = Address.parse(spec), options.pop("python", None)
        engine, _, precision = address.engine.partition(":")
        here = open_runtime(address.engine, **options)  # refuses what doesn't exist before anything is connected
        options |= {"precision": precision} if precision else {}
        return RemoteRuntime(replace(address, engine=engine), here, options, python=python)
    name, colon, precision = spec.partition(":")
    if name not in RUNTIMES:
        known = ", ".join(sorted(RUNTIMES))
        raise UnknownRuntime(f"no runtime is called {spec!r}; there are {known}, and ssh://HOST/NAME for one elsewhere")
    if not colon:
        return RUNTIMES[name](**options)
    if name not in WITH_PRECISION:
        raise UnknownRuntime(f"{name} has no choice of precision, so there is no {spec!r}; write {name}")
    return RUNTIMES[name](precision=precision, **options)


def runtime_spec(runtime: Runtime) -> str:
    """The argument of `open_runtime` that makes such a runtime."""
    return location(runtime) + local_spec(runtime)


def local_spec(runtime: Runtime) -> str:
    """The same on the runtime's own machine: its name, and its precision where it has a choice of it."""
    precision = getattr(runtime, "precision", None)
    return f"{runtime.name}:{precision}" if precision else runtime.name


def location(runtime: Runtime) -> str:
    """What stands before the name in `open_runtime` for a runtime on the same machine: "", or "ssh://HOST/"."""
    return runtime.location if isinstance(runtime, RemoteRuntime) else ""

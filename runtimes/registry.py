"""The runtimes by name: one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import Runtime
from .deepsparse_client import DeepSparse
from .fake import FakeRuntime
from .ort import OnnxRuntime

RUNTIMES: dict[str, Callable[..., Runtime]] = {
    "deepsparse": DeepSparse,
    "fake": FakeRuntime,
    "onnxruntime": OnnxRuntime,
}


class UnknownRuntime(ValueError):
    """No runtime has that name; the message lists those there are."""


def open_runtime(name: str, **options: Any) -> Runtime:
    """A runtime by name; its engine starts at the first call.

    Args:
        name: a key of RUNTIMES.
        options: of that runtime's class, such as `seconds_per_mac` for "fake".
    Raises:
        UnknownRuntime: no such name.
    """
    if name not in RUNTIMES:
        raise UnknownRuntime(f"no runtime is called {name!r}; there are {', '.join(sorted(RUNTIMES))}")
    return RUNTIMES[name](**options)

"""The runtimes by name: one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import Runtime, UnknownRuntime
from .deepsparse_client import DeepSparse
from .fake import FakeRuntime
from .ort import OnnxRuntime
from .remote import RemoteRuntime
from .ssh import PREFIX, Address

RUNTIMES: dict[str, Callable[..., Runtime]] = {
    "deepsparse": DeepSparse,
    "fake": FakeRuntime,
    "onnxruntime": OnnxRuntime,
}


def open_runtime(name: str, **options: Any) -> Runtime:
    """A runtime by name; its engine starts, and another machine is connected, at the first call.

    Args:
        name: a key of RUNTIMES, or ssh://[USER@]HOST[:PORT]/KEY for that runtime on another machine.
        options: of that runtime's class, such as `seconds_per_mac` for "fake". With ssh:// `python` is an
            interpreter on that machine, see `RemoteRuntime`.
    Raises:
        UnknownRuntime: no such name.
    """
    if name.startswith(PREFIX):
        address, python = Address.parse(name), options.pop("python", None)
        return RemoteRuntime(address, open_runtime(address.engine, **options), options, python=python)
    if name not in RUNTIMES:
        known = ", ".join(sorted(RUNTIMES))
        raise UnknownRuntime(f"no runtime is called {name!r}; there are {known}, and ssh://HOST/NAME for one elsewhere")
    return RUNTIMES[name](**options)

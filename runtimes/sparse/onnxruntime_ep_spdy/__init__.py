"""A sparse engine for ONNX Runtime: a plugin execution provider for layers with many zeros in their weights."""

from __future__ import annotations

from pathlib import Path

__all__ = ["get_ep_name", "get_ep_names", "get_library_path", "register"]

_registered: list[str] = []


def get_library_path() -> str:
    """The shared library, as `onnxruntime.register_execution_provider_library` takes it.

    Raises:
        FileNotFoundError: this package was installed without it; the message says how to build it.
    """
    path = Path(__file__).with_name("libonnxruntime_ep_spdy.so")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: install the package with pip, which compiles it")
    return str(path)


def get_ep_name() -> str:
    """The provider's name in `onnxruntime.get_ep_devices()`."""
    return "SpdyExecutionProvider"


def get_ep_names() -> list[str]:
    """Names of all providers of the library."""
    return [get_ep_name()]


def register() -> None:
    """Register the library with ONNX Runtime, once a process.

    >>> import onnxruntime, onnxruntime_ep_spdy
    >>> onnxruntime_ep_spdy.register()
    >>> devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == onnxruntime_ep_spdy.get_ep_name()]
    >>> options = onnxruntime.SessionOptions()
    >>> options.add_provider_for_devices(devices, {})
    """
    import onnxruntime

    if not _registered:
        onnxruntime.register_execution_provider_library(get_ep_name(), get_library_path())
        _registered.append(get_ep_name())

"""How another machine is reached: its address, the `ssh` command line, and what that starts there."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import re
import shlex
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..base import UnknownRuntime
from .uv_command import FOLDERS

PREFIX = "ssh://"
SSH_VARIABLE = "ONNX_SPDY_SSH"
PYTHON_VARIABLE = "ONNX_SPDY_REMOTE_PYTHON"
SSH_FAILED = 255  # ssh's exit code for its own failures; any other is that of the command

# The first value of an option counts: those of ONNX_SPDY_SSH, then these, then the user's configuration.
SSH_OPTIONS = (
    "BatchMode=yes",  # nobody is there to answer a question
    "ConnectTimeout=10",
    "ServerAliveInterval=10",  # a machine that vanished is noticed after three of these
    "ServerAliveCountMax=3",
    "ControlMaster=no",  # a master in the background would keep our pipes open
)
# The working folder is the user's home: its files must not shadow modules.
STARTER = (
    "import sys; sys.path.pop(0); import json; hello = json.loads(sys.stdin.buffer.readline()); "
    'exec(hello["bootstrap"]); start(hello)'
)
COMMON_PACKAGES = ("numpy", "onnx", "onnx-graphsurgeon", "protobuf", "ml_dtypes", "psutil")
ENGINE_PACKAGES: dict[str, tuple[str, ...]] = {
    "cusparselt": ("torch", "onnxscript"),
    "deepsparse": (),  # its worker gets them itself
    "fake": ("onnxruntime",),
    "sparse": ("onnxruntime", "onnxruntime-ep-spdy"),
    "tensorrt": ("tensorrt", "torch", "onnxruntime"),
}  # any other engine's package has the name of its runtime

_ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[^-@:/\s][^@:/\s]*)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^-@:/\s\[\]][^@:/\s\[\]]*)"
    r"(?::(?P<port>\d{1,5}))?/(?P<engine>[^/]+)"
)


@dataclass(frozen=True)
class Address:
    """ssh://[USER@]HOST[:PORT]/ENGINE. HOST may be a name of the user's ssh configuration."""

    target: str  # [USER@]HOST, as ssh takes it
    port: int | None
    engine: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address in a runtime's name.

        Raises:
            UnknownRuntime: it isn't one; the message shows the form.
        """
        found = _ADDRESS.fullmatch(text)
        if not found:
            raise UnknownRuntime(f"{text!r} is not ssh://[USER@]HOST[:PORT]/RUNTIME, such as ssh://board/deepsparse")
        host = found["host"].strip("[]")  # of an IPv6 address
        target = f"{found['user']}@{host}" if found["user"] else host
        return cls(target, int(found["port"]) if found["port"] else None, found["engine"])

    def __str__(self) -> str:
        return f"{self.engine} on {self.target}" + (f" port {self.port}" if self.port else "")


def ssh_command(address: Address, python: str | None) -> list[str]:
    """The command line that starts STARTER on that machine, its stdin and stdout at our end.

    Args:
        python: an interpreter there that has what the engine needs; None lets uv make one.
    """
    options = [part for option in SSH_OPTIONS for part in ("-o", option)]
    port = ["-p", str(address.port)] if address.port else []
    ssh = shlex.split(os.environ.get(SSH_VARIABLE) or "ssh")
    return [*ssh, "-T", *options, *port, address.target, far_command(address.engine, python)]


def far_command(engine: str, python: str | None) -> str:
    """One line for the user's login shell there, whichever that is: a POSIX shell takes over at once."""
    if python:
        script = f"exec {_in_home(python)} -c {shlex.quote(STARTER)}"
    else:
        folders = ":".join(f"$HOME/{folder}" for folder in FOLDERS)
        uv = ["uv", "run", "--quiet", "--isolated", "--no-project", "--python", f"3.{sys.version_info.minor}"]
        for requirement in requirements(engine):
            uv += ["--with", requirement]
        script = (
            f'PATH="$PATH:{folders}"; export PATH; '
            'command -v uv >/dev/null 2>&1 || { echo "there is no uv" >&2; exit 127; }; '
            f"exec {shlex.join([*uv, 'python', '-c', STARTER])}"
        )
    return f"exec sh -c {shlex.quote(script)}"


def requirements(engine: str) -> list[str]:
    """What an engine's process needs, in the versions that are installed here."""
    return [_pinned(name) for name in (*COMMON_PACKAGES, *ENGINE_PACKAGES.get(engine, (engine,)))]


def first_request(reader: str | None = None) -> dict[str, Any]:
    """What the first request carries: this package's sources, and the function that unpacks them.

    Args:
        reader: "MODULE:NAME" of what an engine is to read networks with, whose package travels too.
    """
    sources = _sources_of("onnx_spdy.runtimes")
    if reader:
        sources |= _sources_of(reader.partition(":")[0])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        # A regular package, unlike ours: so another onnx_spdy that is installed there adds nothing to it.
        archive.writestr("onnx_spdy/__init__.py", "")
        for name, source in sources.items():
            archive.writestr(f"onnx_spdy/{name}", source.read_bytes())
    bootstrap = Path(__file__).with_name("bootstrap.py").read_text(encoding="utf-8")
    return {"package": base64.b64encode(packed.getvalue()).decode("ascii"), "bootstrap": bootstrap}


def _sources_of(package: str) -> dict[str, Path]:
    """The files of a package beside this one, by their place below onnx_spdy."""
    found = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (found.submodule_search_locations if found else None) or ()]
    own = package.rpartition(".")[2]
    return {
        f"{own}/{one.relative_to(folder)}": one
        for folder in folders
        for one in sorted(folder.rglob("*.py"))
        if not any((above / "pyproject.toml").exists() for above in one.parents if folder in above.parents)
    }  # without distributions of their own


def _pinned(package: str) -> str:
    try:
        return f"{package}=={metadata.version(package).partition('+')[0]}"  # without the build: the CPU's, say
    except metadata.PackageNotFoundError:
        return package  # not installed here, so no version is the right one; the environment names what was taken


def _in_home(path: str) -> str:
    """The path quoted for a shell, except for a leading ~/."""
    return '"$HOME"/' + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)

"""An SSH server on the loopback interface that `ssh` reaches without a question: as a process of its own.

    python -m tests.ssh_server FOLDER PORT

What is logged in runs a command as sshd does: by the user's shell, in the home folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CHUNK = 1 << 16
STARTED = 20.0  # seconds that a server may take for it


class SshServer:
    """A server, and how it is reached.

    Args:
        folder: of its keys; servers that share it are reached with the same `ssh`.
    Attributes:
        ssh: the command line, for ONNX_SPDY_SSH.
        port: where it listens.
        address: ssh://USER@127.0.0.1:PORT
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("asyncssh") is None:
            pytest.skip("no machine by ssh: asyncssh isn't installed")
        for program in ("ssh", "ssh-keygen"):
            if not shutil.which(program):
                pytest.skip(f"no machine by ssh: there is no {program} here")
        self._folder = folder
        for name in ("host_key", "user_key"):
            if not (folder / name).exists():
                command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(folder / name)]
                subprocess.run(command, check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        kind, key, _ = (folder / "host_key.pub").read_text().split()
        with (folder / "known_hosts").open("a") as known:
            known.write(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        self.ssh = (
            f"ssh -F none -i {folder}/user_key -o IdentitiesOnly=yes -o UserKnownHostsFile={folder}/known_hosts "
            "-o StrictHostKeyChecking=yes"
        )
        self.address = f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"
        self._start()

    def __enter__(self) -> SshServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.ssh_server", str(self._folder), str(self.port)]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env={**os.environ, "PATH": path})
        deadline = time.monotonic() + STARTED
        while not self._listens():
            assert self.process.poll() is None and time.monotonic() < deadline, "the ssh server doesn't start"
            time.sleep(0.05)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def freeze(self) -> None:
        """What a machine does that no longer answers."""
        self.process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        """What a machine does that goes away."""
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """What a machine does that went away and comes back."""
        self.stop()
        self._start()


async def serve(folder: Path, port: int) -> None:
    """Serve until the process is killed."""
    import asyncssh

    class Login(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            self._connection = conn

        def begin_auth(self, username: str) -> bool:
            if username == getpass.getuser():
                self._connection.set_authorized_keys(str(folder / "user_key.pub"))
            return True

        def public_key_auth_supported(self) -> bool:
            return True

    async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:
        pipes = {name: asyncio.subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        shell = os.environ.get("SHELL", "/bin/sh")
        child = await asyncio.create_subprocess_exec(shell, "-c", process.command or "", cwd=Path.home(), **pipes)
        reading = asyncio.create_task(copy(process.stdin, child.stdin))
        await asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
        code = await child.wait()
        reading.cancel()
        process.exit(code if code >= 0 else 128 - code)

    server = await asyncssh.listen(
        "127.0.0.1", port, server_factory=Login, process_factory=run, encoding=None,
        server_host_keys=[str(folder / "host_key")],
    )  # fmt: skip
    await server.wait_closed()


async def copy(source: Any, target: Any) -> None:
    """Pass on what comes until there is nothing more; a target that reads no more loses the rest."""
    with contextlib.suppress(ConnectionError):
        while data := await source.read(CHUNK):
            target.write(data)
            await target.drain()
        target.write_eof()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))

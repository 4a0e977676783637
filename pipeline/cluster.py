"""Tasks on the workers of a Dask cluster that the user has started; needs the extra `onnx-spdy[cluster]`.

Everything travels between this process and the cluster's as Dask pickles it; nothing is unpickled from a file. The
scheduler passes bytes on and needs Dask alone; workers need this package and its dependencies in the same versions.

What tasks have in common is a task's result in the cluster, which Dask makes again where it is lost, and workers get it
from each other. A task of a worker that died is done by another one. Each worker process does one task at a time,
however many threads it has, because a network holds the weights of one run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch

from onnx_spdy.pipeline.tasks import IN_PROCESS, ClusterError, R, S, T, Tasks
from onnx_spdy.runtimes.atomic import UNFINISHED
from onnx_spdy.runtimes.errors import described

if TYPE_CHECKING:
    from distributed import Client, Future

logger = logging.getLogger(__name__)

MEMORY = "MEMORY"  # what Dask's documentation calls this resource of a worker, in bytes
AHEAD = 2  # tasks for each worker: one that is done and one that waits, so that its data is there
CONNECT_SECONDS = 30.0
WORKER_SECONDS = 120.0  # without any worker
POLL_SECONDS = 2.0
SAME_VERSIONS = ("python", "dask", "distributed", "cloudpickle")
INSTALL = "pip install 'onnx-spdy[cluster]'"
_MISSING = re.compile(r"No module named '([\w.]+)'")
FOLDERS = ("models", "pipeline", "runtimes", "tools")


def tasks_on(address: str | None) -> contextlib.AbstractContextManager[Tasks]:
    """Tasks on the cluster of the scheduler at an address; in this process without one."""
    return contextlib.nullcontext(IN_PROCESS) if address is None else connected(address)


@contextlib.contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """The cluster of the scheduler at an address, tcp://HOST:PORT.

    Raises:
        ClusterError: Dask is missing, nobody answers there, no worker is there, or they aren't like this process.
    """
    try:
        import dask
        import distributed
    except ImportError as exc:
        raise ClusterError(f"a cluster needs Dask: {INSTALL}") from exc
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what it tells of lost connections is one line of ours
    try:
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 PiB"}):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of versions, which are compared below
                    client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
            except Exception as exc:  # whatever listens there may answer anything
                raise ClusterError(
                    f"no Dask scheduler answers at {address} ({described(exc, 100)}); start one with `dask scheduler` "
                    "and check address and firewall"
                ) from exc
            try:
                cluster = Cluster(client, address)
                cluster.check()
                yield cluster
            finally:
                with contextlib.suppress(Exception):  # it may be gone
                    client.close(timeout=POLL_SECONDS)
    finally:
        log.setLevel(level)


class Cluster:
    """Does tasks on workers; see `Tasks`.

    Attributes:
        sent_bytes, received_bytes: of what tasks take and give, so far; what they have in common is sent once to each
            worker.
        seconds: of each task, in the order in which they were done.
    """

    is_parallel = True

    def __init__(self, client: Client, address: str) -> None:
        self.sent_bytes = self.received_bytes = 0
        self.seconds: list[float] = []
        self._client, self._address = client, address
        self._shared: tuple[Any, Future] | None = None
        self._turns = count()  # of tasks
        self._looked = -POLL_SECONDS
        self._seen: dict[str, Any] = {}

    def check(self) -> None:
        """Compare the scheduler and its workers with this process.

        Raises:
            ClusterError: no worker comes, or one of them, or the scheduler, has other versions.
        """
        self._wait_for_workers()
        try:
            versions: Any = self._client.get_versions()
        except OSError as exc:
            raise self._lost() from exc
        ours = _versions(versions["client"])
        for who, theirs in {f"the scheduler at {self._address}": versions["scheduler"], **versions["workers"]}.items():
            for name, version in _versions(theirs).items():
                if version != ours[name]:
                    raise ClusterError(
                        f"{_worker(who)} has {name} {version}, this process {ours[name]}; install the same version"
                    )
        mine, kinds = standing(), set()
        for who, found in self._client.run(standing, on_error="return").items():
            if isinstance(found, Exception):
                if missing := _MISSING.search(str(found)):  # Dask may send it as text
                    raise ClusterError(f"{_worker(who)} can't import {missing[1]}; install it there: {INSTALL}")
                raise ClusterError(f"{_worker(who)} can't be used: {described(found, 200)}")
            for name in ("onnx_spdy", "torch", "numpy"):
                if found[name] != mine[name]:
                    raise ClusterError(
                        f"{_worker(who)} has another {name} ({found[name]}) than this process ({mine[name]}); "
                        "install the same version"
                    )
            kinds.add((found["cpu"], found["threads"]))
        if len(kinds) > 1:
            logger.warning("workers have different CPUs or threads: results may depend on who computes in last bits")

    def map(
        self, function: Callable[[S, T], R], shared: S, items: Iterable[T], needs: Callable[[T], int] | None = None
    ) -> Iterator[tuple[int, R]]:
        numbered = enumerate(items)
        done: SimpleQueue[Future] = SimpleQueue()
        running: dict[Future, int] = {}
        try:
            while True:
                room = AHEAD * max(1, len(self._workers())) - len(running)
                for number, item in islice(numbered, max(0, room)):
                    future = self._submit(function, shared, item, needs(item) if needs else 0)
                    running[future] = number
                    future.add_done_callback(done.put)
                if not running:
                    return
                future = self._next(done)
                yield running.pop(future), self._result(future)
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self._client.cancel(list(running), force=True)

    def sees(self, folder: Path) -> bool:
        prefix = f".shared.{os.getpid()}-"
        try:
            with NamedTemporaryFile(dir=folder, prefix=prefix, suffix=UNFINISHED) as file:
                path = Path(file.name).absolute()
                return all(self._client.run(Path.is_file, path, on_error="ignore").values())
        except OSError:  # nothing can be written there
            return False

    def _submit(self, function: Callable[[S, T], R], shared: S, item: T, need: int) -> Future:
        import cloudpickle

        common = self._common(shared)
        packed = _packed((function, item), cloudpickle)
        self.sent_bytes += len(packed)
        limits = [worker["resources"].get(MEMORY) or worker["memory_limit"] for worker in self._workers().values()]
        if limits and all(limits) and need > max(limits):
            raise ClusterError(
                f"a task needs {need / 2**30:.1f} GiB of memory, the largest worker has {max(limits) / 2**30:.1f}; "
                "start workers with more (--memory-limit)"
            )
        is_declared = any(MEMORY in worker["resources"] for worker in self._workers().values())
        return self._client.submit(
            _performing(), common, common.key, packed, standing()["onnx_spdy"],
            key=f"onnx-spdy-{uuid4().hex}", pure=False, resources={MEMORY: need} if is_declared and need else None,
            priority=-next(self._turns),  # of those that wait the first is next, whatever their keys are
        )  # fmt: skip

    def _common(self, shared: Any) -> Future:
        """What tasks have in common, packed; the last one is kept."""
        import cloudpickle

        if self._shared is None or self._shared[0] is not shared:
            key = f"onnx-spdy-common-{uuid4().hex}"
            self._shared = shared, self._client.submit(_identity(), _packed(shared, cloudpickle), key=key, pure=False)
        return self._shared[1]

    def _next(self, done: SimpleQueue[Future]) -> Future:
        while True:
            try:
                return done.get(timeout=POLL_SECONDS)
            except Empty:
                self._wait_for_workers()

    def _result(self, future: Future) -> Any:
        from distributed import KilledWorker

        if future.status not in ("finished", "error"):
            raise self._lost()
        try:
            packed, seconds, fetched_bytes = future.result()
        except KilledWorker as exc:
            raise ClusterError(
                "the same task ended several workers, most likely for want of memory: start workers with more "
                "(--memory-limit), or give --memory less"
            ) from exc
        except ImportError as exc:
            raise ClusterError(f"a worker can't import {exc.name}; install it there") from exc
        except Exception:
            if self._client.status != "running":
                raise self._lost() from None
            raise
        self.sent_bytes += fetched_bytes
        self.received_bytes += len(packed)
        self.seconds.append(seconds)
        return pickle.loads(packed)

    def _workers(self) -> dict[str, Any]:
        """Address of each worker -> what it has; at most `POLL_SECONDS` old."""
        if time.monotonic() - self._looked > POLL_SECONDS:
            try:
                self._seen = dict(self._client.scheduler_info(n_workers=-1)["workers"])
            except Exception as exc:
                raise self._lost() from exc
            self._looked = time.monotonic()
        return self._seen

    def _wait_for_workers(self) -> None:
        for waited in count():
            if self._client.status != "running":
                raise self._lost()
            if self._workers():
                return
            if waited * POLL_SECONDS > WORKER_SECONDS:
                raise ClusterError(
                    f"no worker has come to {self._address} for {WORKER_SECONDS:.0f} s; start some with "
                    f"`dask worker {self._address} --nthreads 1`"
                )
            time.sleep(POLL_SECONDS)

    def _lost(self) -> ClusterError:
        return ClusterError(
            f"the Dask scheduler at {self._address} was lost; what is finished is kept: start it again, and call the "
            "same command again"
        )


def standing() -> dict[str, Any]:
    """What has to be alike where tasks are done: versions, and what last bits may depend on."""
    return {
        "onnx_spdy": _code_sha256()[:12], "torch": torch.__version__, "numpy": np.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
    }  # fmt: skip


_alone = threading.Lock()
_common: dict[str, Any] = {}  # on a worker: the last one


def perform(shared: bytes, key: str, packed: bytes, code: str) -> tuple[bytes, float, int]:
    """Do a task, on a worker: its result, packed, its seconds, and the bytes that this worker hadn't had before.

    Raises:
        ClusterError: this isn't the code that asks for it.
    """
    import cloudpickle

    if code != standing()["onnx_spdy"]:
        raise ClusterError("a worker that joined has another version of onnx_spdy; install the same there")
    with _alone:
        is_new = key not in _common
        if is_new:
            _common.clear()
            _common[key] = pickle.loads(shared)
        start = time.perf_counter()
        function, item = pickle.loads(packed)
        result = cloudpickle.dumps(function(_common[key], item))
        return result, time.perf_counter() - start, len(shared) if is_new else 0


def _performing() -> Callable[..., Any]:
    """`perform`, as Dask sends it: a function that isn't a module's travels whole, so the scheduler needs no module."""

    def performed(*arguments: Any) -> Any:
        from onnx_spdy.pipeline.cluster import perform

        return perform(*arguments)

    return performed


def _identity() -> Callable[[bytes], bytes]:
    def same(packed: bytes) -> bytes:
        return packed

    return same


def _packed(value: Any, cloudpickle: Any) -> bytes:
    """Pickled, the user's own functions with their code.

    Raises:
        ClusterError: it can't be.
    """
    mine = [module for name, module in sys.modules.items() if name.startswith("_onnx_spdy_user_")]
    for module in mine:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(value)
    except Exception as exc:  # protobuf beyond 2 GiB, a user's function that holds a file, ...
        raise ClusterError(f"this can't be sent to workers: {described(exc, 200)}") from exc
    finally:
        for module in mine:
            cloudpickle.unregister_pickle_by_value(module)


def _versions(machine: dict[str, Any]) -> dict[str, str]:
    packages = dict(machine["packages"])
    packages["python"] = ".".join(packages["python"].split(".")[:2])
    return {name: packages[name] for name in SAME_VERSIONS}


def _worker(who: str) -> str:
    return who if " " in who else f"worker {who}"


@cache
def _code_sha256() -> str:
    """Of all our modules: what tasks compute depends on them."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)};".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()

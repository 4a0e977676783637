"""The database and the search on the workers of a Dask cluster: the same bits as here, whoever dies meanwhile."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import distributed
import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline import cluster as cluster_module
from onnx_spdy.pipeline.cluster import Cluster, connected
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import LayerDatabase, build_database, open_database
from onnx_spdy.pipeline.database.pruners import NamedPruner, Pruner, PrunerFailed, pruner_named
from onnx_spdy.pipeline.database.pruners.obs import obs
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.search.profile_search import ProfileSearch
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.pipeline.tasks import IN_PROCESS, ClusterError, Tasks
from onnx_spdy.runtimes import Workload, open_runtime

LEVELS = levels_for("unstructured")[::8]
SITE_PACKAGES = Path(distributed.__file__).parent.parent

Build = Callable[..., LayerDatabase]


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster with two workers, which declare their memory."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit="4 GiB", resources={"MEMORY": 4e9}
    ) as local:
        yield local.scheduler_address


@pytest.fixture
def cluster(scheduler: str) -> Iterator[Cluster]:
    with connected(scheduler) as found:
        yield found


@pytest.fixture(scope="module")
def data() -> Samples:
    """Three shards, the last one smaller."""
    rng = np.random.default_rng(1)
    return Samples({"input": rng.normal(size=(600, 3, 12, 12)).astype(np.float32).cumsum(axis=3)})


@pytest.fixture
def build(model: onnx.ModelProto, data: Samples, tmp_path: Path) -> Build:
    def make(folder: str, tasks: Tasks = IN_PROCESS, prune: Pruner = obs, levels=LEVELS, **more) -> LayerDatabase:
        pruner = NamedPruner("obs", prune, pruner_named("obs").prune_units)
        return build_database(
            Network(Prepared(model)), data, Compression(levels, pruner), tmp_path / folder, tasks=tasks, **more
        )

    return make


@pytest.fixture(scope="module")
def table(model: onnx.ModelProto) -> LatencyTable:
    with open_runtime("fake", layer_overhead_seconds=0.0, node_seconds=1e-9) as runtime:
        return measure_latency(Prepared(model), runtime, LEVELS, Workload(8))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("pattern", ["unstructured", "channels"])
def test_a_database_has_the_same_bits_as_one_that_was_built_here(
    pattern: str, cluster: Cluster, build: Build, tmp_path: Path
) -> None:
    levels, told = levels_for(pattern)[::8], []
    here = build("here", levels=levels)
    there = build("there", cluster, levels=levels, progress=lambda *progress: told.append(progress))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert there.layers == here.layers
    assert told[:3] == [(256, 600, "hessians"), (512, 600, "hessians"), (600, 600, "hessians")]
    assert told[-1][0] == told[-1][1] == len(here.layers)


def test_where_workers_do_not_see_the_folder_files_are_sent_back(
    cluster: Cluster, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.sees(tmp_path)
    build("here")
    monkeypatch.setattr(Cluster, "sees", lambda self, folder: False)
    build("there", cluster)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.parametrize("is_seen", [True, False])
@pytest.mark.parametrize("method", ["thompson", "spdy"])
def test_a_search_finds_the_same_profile_in_the_same_way(
    method: str,
    is_seen: bool,
    cluster: Cluster,
    build: Build,
    model: onnx.ModelProto,
    table: LatencyTable,
    data: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cluster, "sees", lambda self, folder: is_seen)
    build("database")
    found = []
    for name, tasks in (("here", IN_PROCESS), ("there", cluster)):
        settings = SearchSettings(method, samples=200, sample_limit=5000, seed=3)
        network, database = Network(Prepared(model)), open_database(tmp_path / "database")
        search = ProfileSearch(
            network, table, database, data, settings, state=tmp_path / f"{name}.json", tasks=tasks
        )  # fmt: skip
        found.append((search.find(2.0), search.find(1.5), search._state._log))
    assert found[0] == found[1]
    assert cluster.seconds


def test_a_worker_that_dies_costs_its_task_only(cluster: Cluster, build: Build, tmp_path: Path) -> None:
    died = str(tmp_path / "died")

    def kills_once(weight, hessian, levels):
        import os  # the function travels alone
        import signal

        if weight.shape[0] == 24 and not os.path.exists(died):  # noqa: PTH110
            os.close(os.open(died, os.O_CREAT))
            os.kill(os.getpid(), signal.SIGKILL)
        from onnx_spdy.pipeline.database.pruners.obs import obs

        yield from obs(weight, hessian, levels)

    build("here")
    build("there", cluster, kills_once)
    assert Path(died).exists()
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_what_a_task_raises_arrives_and_what_was_finished_is_kept(
    cluster: Cluster, build: Build, tmp_path: Path
) -> None:
    index = tmp_path / "there" / "index.json"

    def does_nothing(weight, hessian, levels):
        import time

        from onnx_spdy.pipeline.database.pruners.obs import obs

        if weight.shape[0] != 10:  # the smallest layer is the last one
            yield from obs(weight, hessian, levels)
            return
        while not index.exists():
            time.sleep(0.05)
        for _ in levels:
            yield weight.clone()

    with pytest.raises(PrunerFailed, match="matmul_d"):
        build("there", cluster, does_nothing)
    kept = open_database(tmp_path / "there").layers
    assert 0 < len(kept) < 4
    build("there", cluster)
    build("here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_task_that_no_worker_has_memory_for_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"a task needs 1024\.0 GiB of memory, the largest worker has 3\.7"):
        list(cluster.map(lambda shared, item: item, None, [1], lambda item: 2**40))


def test_what_cannot_be_sent_is_told(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="this can't be sent to workers: TypeError"):
        list(cluster.map(lambda shared, item: item, threading.Lock(), [1]))


def test_what_a_worker_cannot_import_is_told(cluster: Cluster) -> None:
    def imports(shared: None, item: int) -> None:
        import a_module_that_is_nowhere  # noqa: F401

    with pytest.raises(ClusterError, match="a worker can't import a_module_that_is_nowhere"):
        list(cluster.map(imports, None, [1]))


@contextmanager
def programs(*commands: list[str]) -> Iterator[list[subprocess.Popen]]:
    started: list[subprocess.Popen] = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def dask(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"distributed.cli.dask_{name}", *arguments]


def test_a_scheduler_that_dies_is_one_line_and_the_next_start_continues(build: Build, tmp_path: Path) -> None:
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    start = dask("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    worker = dask("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
    with programs(start, worker) as (scheduler, _):
        pid, index = scheduler.pid, tmp_path / "there" / "index.json"

        def kills_scheduler(weight, hessian, levels):
            import os
            import signal
            import time

            from onnx_spdy.pipeline.database.pruners.obs import obs

            if weight.shape[0] == 10:  # the last one
                end = time.monotonic() + 60  # were it the first after all, the test shall fail and not hang
                while not index.exists() and time.monotonic() < end:
                    time.sleep(0.05)
                os.kill(pid, signal.SIGKILL)
            yield from obs(weight, hessian, levels)

        with (
            pytest.raises(ClusterError, match="was lost; what is finished is kept: start it again") as caught,
            connected(address) as cluster,
        ):
            build("there", cluster, kills_scheduler)
    assert "\n" not in str(caught.value)
    assert 0 < len(open_database(tmp_path / "there").layers) < 4
    build("there")
    build("here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_worker_without_this_package_is_told() -> None:
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0") as local:
        code = (
            f"import sys; sys.path[:0] = [{str(SITE_PACKAGES)!r}]; sys.argv = ['worker', {local.scheduler_address!r}, "
            "'--nthreads', '1', '--no-nanny', '--no-dashboard']; from distributed.cli.dask_worker import main; main()"
        )
        with (
            programs([sys.executable, "-S", "-c", code]),
            pytest.raises(ClusterError, match=r"worker tcp://.* can't import onnx_spdy; install it there"),
            connected(local.scheduler_address),
        ):
            pass


def test_where_no_worker_comes_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "WORKER_SECONDS", 0.1)
    monkeypatch.setattr(cluster_module, "POLL_SECONDS", 0.1)
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0") as local,
        pytest.raises(ClusterError, match="start some with `dask worker tcp://"),
        connected(local.scheduler_address),
    ):
        pass


@pytest.mark.parametrize("name", ["python", "distributed"])
def test_a_scheduler_of_another_version_is_told(name: str, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = distributed.Client.get_versions

    def older(client: distributed.Client) -> dict:
        found = versions(client)
        found["scheduler"]["packages"][name] = "2.7.0"
        return found

    monkeypatch.setattr(distributed.Client, "get_versions", older)
    with pytest.raises(ClusterError, match=rf"the scheduler at tcp://.* has {name} 2\.7"), connected(scheduler):
        pass


def test_a_worker_with_other_code_is_told(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_code_sha256", lambda: "0" * 64)
    with pytest.raises(ClusterError, match=r"worker tcp://.* has another onnx_spdy"), connected(scheduler):
        pass


def test_what_is_no_scheduler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1.0)

    def chatters(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"220 mail\r\n" * 10)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=chatters, args=(server,), daemon=True).start()
        ports = (free_port(), server.getsockname()[1])
        for port in ports:
            with (
                pytest.raises(ClusterError, match=f"no Dask scheduler answers at tcp://127.0.0.1:{port}") as caught,
                connected(f"tcp://127.0.0.1:{port}"),
            ):
                pass
            assert "\n" not in str(caught.value)
        server.shutdown(socket.SHUT_RDWR)


def test_without_dask_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=r"pip install 'onnx-spdy\[cluster\]'"), connected("tcp://127.0.0.1:1"):
        pass


def test_dask_is_imported_only_when_it_is_used() -> None:
    code = "import sys, onnx_spdy.tools.commands; print({'dask', 'distributed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

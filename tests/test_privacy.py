"""What our processes leave in a user's home: nothing, by ONNX Runtime's telemetry least of all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import ort_process
from onnx_spdy.runtimes.worker.ssh import STARTER, first_request

VARIABLE = "ORT_DISABLE_TELEMETRY"
SEEN = f"import os; print(os.environ.get({VARIABLE!r}))"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home" / "cache").mkdir(parents=True)
    return tmp_path / "home"


def environment(home: Path, **more: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return {**ours, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1", **more}


def files(home: Path) -> list[str]:
    return [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]


def run(home: Path, *command: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=environment(home, **more), cwd=home.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def network(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=size).astype(np.float32) for size in ((64, 1024), (1024, 64))]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        onnx.helper.make_node("Relu", ["a"], ["b"], "relu"),
        onnx.helper.make_node("MatMul", ["b", "w1"], ["y"], "second"),
    ]
    graph = onnx.helper.make_graph(
        nodes, "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 64])],
        [onnx.numpy_helper.from_array(array, f"w{k}") for k, array in enumerate(weights)],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(64, 64)).astype(np.float32))
    return tmp_path / "model.onnx"


def test_this_version_of_onnx_runtime_would_write_there(home):
    """Otherwise the tests below show nothing. It writes from a thread of its own, now and then not before the end."""
    for _ in range(3):
        run(home, "-c", "import onnxruntime, time; time.sleep(1)")
        if files(home):
            return
    pytest.skip("this version of ONNX Runtime writes nothing, or didn't now")


@pytest.mark.parametrize("room", ["runtimes", "models", "pipeline.run", "tools.commands", "runtimes.worker.serve"])
def test_importing_one_of_ours_before_onnx_runtime_keeps_its_telemetry_off(room, home):
    run(home, "-c", f"import onnx_spdy.{room}, onnxruntime")
    assert files(home) == []


def test_a_value_that_the_user_has_set_stays(home):
    assert run(home, "-c", f"import onnx_spdy.models; {SEEN}", **{VARIABLE: "0"}).strip() == "0"


def test_the_process_that_tries_graphs_keeps_it_off_by_itself(home):
    run(home, str(Path(ort_process.__file__).with_name("ort_worker.py")))  # its stdin is at its end
    assert files(home) == []


def test_the_deepsparse_worker_keeps_it_off_by_itself(home):
    worker = Path(ort_process.__file__).parent.parent / "runtimes" / "deepsparse" / "worker.py"
    code = f"import runpy; runpy.run_path({str(worker)!r}); {SEEN}"
    assert run(home, "-c", code).strip() == "1"


def test_the_far_end_of_ssh_keeps_it_off(home):
    hello = {"id": 1, "op": "hello", "engine": "onnxruntime", "options": {}, **first_request()}
    command = [sys.executable, "-c", STARTER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(home), text=True
    ) as far:
        assert far.stdin and far.stdout
        for request in (hello, {"id": 2, "op": "check"}):
            far.stdin.write(json.dumps(request) + "\n")
            far.stdin.flush()
            assert "result" in json.loads(far.stdout.readline())
        far.stdin.close()
    assert files(home) == []


def test_the_command_line_leaves_nothing_in_the_home(home, network):
    cli = ("-m", "onnx_spdy.tools.cli")
    run(home, *cli, "prepare", str(network), "--out", "prepared.onnx")
    options = "--data data.npz --runtime fake --batch 64 --speedup 1.2 --out out"
    run(home, *cli, "run", str(network), *options.split())
    assert (home.parent / "out" / "model.onnx").exists()
    assert files(home) == []

"""The command line as a user meets it: the whole way in processes of their own, wrong input in this one."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import find_layers
from onnx_spdy.pipeline.database.layer_database import open_database
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.tools.cli import main

NETWORK = """
import numpy as np
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )
    return layers.eval(), (torch.zeros(2, 3, 16, 16),)

def data():
    rng = np.random.default_rng(0)
    return {"input": rng.normal(size=(48, 3, 16, 16)).astype(np.float32), "target": rng.integers(0, 10, 48)}

def batches():
    whole = data()
    return ({name: array[i : i + 16] for name, array in whole.items()} for i in range(0, 48, 16))

def broken():
    raise RuntimeError("no disk\\nhere")

def mean_output(outputs, target):
    return float(outputs["output"].mean())
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, in a folder."""

    def call(*arguments: object, cwd: Path) -> Done:
        monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Done(int(caught.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "user.py").write_text(NETWORK)
    return folder


RUN = ("run", "user.py:network", "--data", "user.py:data", "--runtime", "fake", "--batch", "16")


def test_run_then_every_single_step_by_hand_gives_the_same_network(folder: Path, cli: Cli) -> None:
    options = ("--speedup", "1.3", "--eval", "user.py:batches", "--metric", "top1", "--out", "whole")
    done = subprocess.run(
        [sys.executable, "-m", "onnx_spdy.tools.cli", *RUN, *options],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert "measured speedup" in done.stdout
    assert "come from a formula" in done.stdout
    assert "every dense alternative" in done.stdout
    report = json.loads((folder / "whole" / "report.json").read_text())
    assert report["measured_speedup_lower"] >= 1.3
    assert "<html" in (folder / "whole" / "report.html").read_text()
    steps = [
        ("measure", "user.py:network", "--runtime", "fake", "--batch", 16, "--data", "user.py:data",
         "--out", "latency.json"),
        ("database", "whole/dense.onnx", "--data", "user.py:data", "--out", "db"),
        ("search", "user.py:network", "--latency", "latency.json", "--database", "db", "--data", "user.py:data",
         "--speedup", "1.3", "--out", "profile.json"),
        ("deploy", "user.py:network", "--database", "db", "--profile", "profile.json", "--data", "user.py:data",
         "--out", "model.onnx"),
        ("validate", "whole/dense.onnx", "model.onnx", "--runtime", "fake", "--batch", 16, "--data", "user.py:data",
         "--metric", "user.py:mean_output", "--json", "validation.json"),
        ("report", "whole"),
        ("inspect", "model.onnx"),
    ]  # fmt: skip
    for step in steps:
        made = cli(*step, cwd=folder)
        assert made.code == 0, (step, made.err)
        assert made.out
        if step[0] == "measure":
            assert "break-even" in made.out
            assert "highest reachable speedup" in made.out
            assert "the table predicted" in made.out
    assert (folder / "model.onnx").read_bytes() == (folder / "whole" / "model.onnx").read_bytes()
    assert json.loads((folder / "validation.json").read_text())["measured_speedup"] == report["measured_speedup"]


def test_several_targets_share_one_call(folder: Path, cli: Cli) -> None:
    test_inputs = ("--latency", "whole/latency.json", "--database", "whole/database", "--data", "user.py:data")
    done = cli(
        "search",
        "user.py:network",
        *test_inputs,
        "--speedup",
        "1.1,1.3",
        "--search",
        "uniform",
        "--out",
        "u.json",
        cwd=folder,
    )
    assert done.code == 0, done.err
    targets = [json.loads((folder / name).read_text())["target_speedup"] for name in ("u-1.1x.json", "u-1.3x.json")]
    assert targets == [1.1, 1.3]


def test_several_targets_make_a_front_of_networks(folder: Path, cli: Cli) -> None:
    options = ("--speedup", "1.3,1.1", "--search", "dp", "--pruner", "magnitude", "--out", "front")
    done = cli(*RUN, *options, cwd=folder)
    assert done.code == 0, done.err
    for name in ("1.1x/model.onnx", "1.3x/report.html", "front.json", "front.html", "front.svg", "dense.onnx"):
        assert (folder / "front" / name).is_file()
    again = cli("report", "front", cwd=folder)
    assert again.code == 0, again.err
    assert again.out in done.out
    assert "come from a formula" in again.out


def bad_inputs(folder: Path) -> None:
    (folder / "text.onnx").write_text("this is not a network")
    (folder / "random.onnx").write_bytes(np.random.default_rng(0).bytes(4000))
    good = np.zeros((16, 3, 16, 16), np.float32)
    np.savez(folder / "shape.npz", input=good[:, :, :8])
    np.savez(folder / "nan.npz", input=np.full_like(good, np.nan))
    np.savez(folder / "names.npz", images=good)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*RUN, "--speedup", "500", "--out", "x"), 1, "highest reachable is"),
        ((*RUN, "--speedup", "0.5", "--out", "x"), 2, "at least 1"),
        ((*RUN, "--speedup", "fast", "--out", "x"), 2, "'--speedup'"),
        ((*RUN, "--speedup", "2,,3", "--out", "x"), 2, "at least 1"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--against", "worst"), 2, "'worst' is not same or best"),
        ((*RUN, "--speedup", "1.3"), 2, "--out"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--batch", "0"), 2, "--batch"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--runtime", "abacus"), 1, "no runtime is called 'abacus'"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--search", "luck"), 1, "unknown search 'luck'"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--pruner", "axe"), 1, "unknown pruner 'axe'"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--pattern", "3:2"), 1, "0 < N < M"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--loss", "mine"), 1, "unknown loss 'mine'"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--metric", "best"), 1, "unknown metric 'best'"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--data", "shape.npz"), 1, "has shape (16, 3, 8, 16)"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--data", "nan.npz"), 1, "NaN"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--data", "names.npz"), 1, "no array for input 'input'"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--data", "user.py:broken"), 1, "RuntimeError: no disk here"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--data", "user.py:nothing"), 1, "no function 'nothing'"),
        ((*RUN, "--speedup", "1.3", "--out", "x", "--data", "missing.npz"), 1, "missing.npz"),
        (("inspect", "text.onnx"), 1, "text.onnx"),
        (("inspect", "random.onnx"), 1, "random.onnx"),
        (("inspect", "missing.onnx"), 1, "missing.onnx"),
        (("inspect", "user.py"), 1, "neither a path ending in .onnx nor FILE.py:FUNCTION"),
        (("inspect", "user.py:data"), 1, "must return (module, example_inputs)"),
        (("report", "nowhere"), 1, "report.json can't be read"),
        (("fly",), 2, "fly"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, cli: Cli, arguments: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "user.py").write_text(NETWORK)
    bad_inputs(tmp_path)
    before = {path.name for path in tmp_path.iterdir()} | {"__pycache__"}
    done = cli(*arguments, cwd=tmp_path)
    assert done.code == code
    assert message in " ".join(done.err.replace("│", " ").split())
    if code == 1:
        assert [line for line in done.err.splitlines() if line.startswith("error: ")] == done.err.splitlines()[-1:]
    left = {path.name for path in tmp_path.iterdir()} - before
    # An impossible target is only known once the table is measured: that is kept, for the next try.
    kept = {path.name for path in (tmp_path / "x").iterdir()} if left else set()
    assert kept <= ({".lock", "dense.onnx", "latency.json"} if "500" in arguments else set())


def test_doctor_names_every_runtime(folder: Path, cli: Cli) -> None:
    done = cli("doctor", cwd=folder)
    assert done.code == 0
    for name in ("cusparselt", "deepsparse", "onnxruntime", "openvino", "tensorrt", "fake"):
        assert name in done.out
    assert done.out.replace("\n", " ").count("not run on hardware") == 1  # tensorrt


def test_a_pattern_without_kernels_is_warned_of(folder: Path, cli: Cli) -> None:
    arguments = ("measure", "user.py:network", "--pattern", "2:4", "--out", "w.json", "--allow-busy")
    done = cli(*arguments, "--runtime", "fake", cwd=folder)
    said = " ".join(done.err.split())
    assert "fake has no kernels for 2:4: takes its zeros as it takes any others" in said
    assert "cusparselt, tensorrt have them" in said
    assert "warning" not in cli("measure", "user.py:network", "--runtime", "fake", "--out", "v.json", cwd=folder).err


def test_inspect_shows_the_pattern_along_the_input_channels(folder: Path, cli: Cli) -> None:
    keep = np.tile(np.array([1, 0, 1, 0], np.float32), 8)  # 2 of 4
    arrays = {
        "conv": np.ones((32, 32, 3, 3), np.float32) * keep[:, None, None],
        "across": np.ones((32, 32, 3, 3), np.float32) * keep[:, None, None, None],
        "gemm_t": np.ones((32, 32), np.float32) * keep,
        "gemm": np.ones((32, 32), np.float32) * keep[:, None],
        "matmul": np.ones((32, 32), np.float32) * keep[:, None],
        "wrong": np.ones((32, 32), np.float32) * keep,
    }
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("Conv", ["input", "conv"], ["a"], "n_conv"), make("Conv", ["a", "across"], ["b"], "n_across"),
        make("GlobalAveragePool", ["b"], ["c"], "pool"), make("Flatten", ["c"], ["d"], "flat"),
        make("Gemm", ["d", "gemm_t"], ["e"], "n_gemm_t", transB=1), make("Gemm", ["e", "gemm"], ["f"], "n_gemm"),
        make("MatMul", ["f", "matmul"], ["g"], "n_matmul"), make("MatMul", ["g", "wrong"], ["output"], "n_wrong"),
    ]  # fmt: skip
    graph = onnx.helper.make_graph(
        nodes, "g", [value("input", 1, ["n", 32, 8, 8])], [value("output", 1, ["n", 32])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    path = folder / "patterns.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    done = cli("inspect", path, cwd=folder)
    layers = done.out[: done.out.index("Groups")]
    rows = {line.split()[1]: line for line in layers.splitlines() if line.split()[1:2] and "n_" in line}
    assert {name for name, line in rows.items() if "2:4" in line} == {"n_conv", "n_gemm_t", "n_gemm", "n_matmul"}
    assert {name for name, line in rows.items() if "block4" in line} == {"n_across", "n_wrong"}  # whole channels
    assert "4 of them are 2:4" in layers


def test_inspect_says_why_layers_are_skipped(folder: Path, cli: Cli) -> None:
    onnx_file = folder / "depthwise.onnx"
    node = onnx.helper.make_node("Conv", ["input", "w"], ["output"], "depthwise", group=32)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [value("input", 1, ["n", 32, 8, 8])], [value("output", 1, ["n", 32, 6, 6])],
        [onnx.numpy_helper.from_array(np.ones((32, 1, 3, 3), np.float32), "w")],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), onnx_file)
    done = cli("inspect", onnx_file, cwd=folder)
    assert done.code == 0, done.err
    assert "depthwise convolution" in done.out
    assert "0 prunable layers" in done.out


def test_inspect_shows_what_shrinks_together(folder: Path, cli: Cli) -> None:
    done = cli("inspect", "user.py:network", cwd=folder)
    assert done.code == 0, done.err
    groups = done.out[done.out.index("Groups") :]
    assert "inner" in groups
    assert "keeps its shape" in " ".join(groups.split())
    assert "groups of units that can be removed" in groups


def test_a_pruned_network_is_trained_and_keeps_its_zeros(folder: Path, cli: Cli) -> None:
    done = cli("finetune", "whole/dense.onnx", "whole/model.onnx", "--data", "user.py:data", "--epochs", 2,
               "--out", "tuned.onnx", cwd=folder)  # fmt: skip
    assert done.code == 0, done.err
    assert "held-out" in done.out
    assert "labels" in done.out
    pruned, tuned = onnx.load(folder / "whole" / "model.onnx"), onnx.load(folder / "tuned.onnx")
    for before, after in zip(pruned.graph.initializer, tuned.graph.initializer, strict=True):
        zero = onnx.numpy_helper.to_array(before) == 0
        if before.name.endswith("weight"):
            assert not onnx.numpy_helper.to_array(after)[zero].any()
    assert not list(folder.glob("tuned.onnx.*"))


def test_a_dense_network_is_pruned_gradually_to_a_profile(folder: Path, cli: Cli) -> None:
    done = cli("finetune", "user.py:network", "--profile", "whole/profile.json", "--data", "user.py:data",
               "--epochs", 2, "--out", "gradual.onnx", cwd=folder)  # fmt: skip
    assert done.code == 0, done.err
    levels = Profile.load(folder / "whole" / "profile.json").levels
    check_deployed_zeros(onnx.load(folder / "gradual.onnx"), levels)


def check_deployed_zeros(model: onnx.ModelProto, levels: dict[str, Level]) -> None:
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    sparse = [layer for layer in find_layers(model) if levels.get(layer.name, DENSE) != DENSE]
    assert sparse
    for layer in sparse:
        assert float((arrays[layer.weight] == 0).mean()) >= levels[layer.name].sparsity - 1e-3


def test_deploy_repairs_where_it_is_asked_to(folder: Path, cli: Cli) -> None:
    """From a database of the magnitude pruner, at a high speedup: more is left to repair than rounding errors."""
    options = ("--data", "user.py:data", "--pruner", "magnitude", "--out", "weak")
    assert cli("database", "user.py:network", *options, cwd=folder).code == 0
    known = ("user.py:network", "--database", "weak")
    done = cli("deploy", *known, "--profile", "whole/profile.json", "--out", "no.onnx", cwd=folder)
    assert done.code == 1 and "its pruner is obs, this run's is magnitude" in done.err
    options = ("--latency", "whole/latency.json", "--data", "user.py:data", "--speedup", "3.5", "--search", "dp")
    assert cli("search", *known, *options, "--out", "weak.json", cwd=folder).code == 0
    arguments = ("deploy", *known, "--profile", "weak.json")
    done = cli(*arguments, "--data", "user.py:data", "--finetune", "gap", "--out", "repaired.onnx", cwd=folder)
    assert done.code == 0, done.err
    before, after = re.search(r"repair: loss on 16 held-out samples (\S+) before, (\S+) after", done.out).groups()  # type: ignore[union-attr]
    assert float(after) < 0.8 * float(before)
    assert cli(*arguments, "--data", "user.py:data", "--out", "plain.onnx", cwd=folder).code == 0
    assert (folder / "repaired.onnx").read_bytes() != (folder / "plain.onnx").read_bytes()
    assert cli(*arguments, "--finetune", "gap", "--out", "no.onnx", cwd=folder).code == 2
    options = ("--data", "user.py:data", "--finetune", "full", "--finetune-limit", "1")
    done = cli(*arguments, *options, "--out", "full.onnx", cwd=folder)
    assert done.code == 0, done.err
    before, after = re.search(r"finetune: loss on 16 held-out samples (\S+) before, (\S+) after", done.out).groups()  # type: ignore[union-attr]
    assert float(after) <= float(before)  # labels drawn at random can be learnt by heart only
    check_deployed_zeros(onnx.load(folder / "full.onnx"), Profile.load(folder / "weak.json").levels)


def test_all_layers_can_get_one_level_one_after_another(folder: Path, cli: Cli) -> None:
    level = "unstructured@0.5000"
    options = ("--data", "user.py:data", "--pattern", level, "--sequential", "--out", "one")
    assert cli("database", "user.py:network", *options, cwd=folder).code == 0
    arguments = ("deploy", "user.py:network", "--database", "one", "--out", "one.onnx")
    assert cli(*arguments, "--level", level, cwd=folder).code == 0
    names = open_database(folder / "one").layers
    check_deployed_zeros(onnx.load(folder / "one.onnx"), dict.fromkeys(names, Level.parse(level)))
    done = cli(*arguments, "--level", "2:4", cwd=folder)
    assert done.code == 1 and "has no level 2:4; it has dense, unstructured@0.5000" in done.err
    assert cli(*arguments, cwd=folder).code == cli(*arguments, "--level", level, "--profile", "p", cwd=folder).code == 2
    options = ("--data", "user.py:data", "--sequential", "--out", "many")
    done = cli("database", "user.py:network", *options, cwd=folder)
    assert done.code == 1 and "--sequential needs one level" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "user.py:data"), "is for --finetune full, and this is none"),
        (("--finetune", "gap", "--train", "user.py:data"), "is for --finetune full, and this is gap"),
        (("--finetune", "full", "--finetune-limit", "0"), "0 is not a positive number of minutes"),
        (("--finetune", "best"), "unknown repair 'best'; known: none, gap, full"),
    ],
)
def test_wrong_training_options_are_told_before_the_work(
    folder: Path, cli: Cli, options: tuple[str, ...], message: str
) -> None:
    known = ("--data", "user.py:data", "--runtime", "fake", "--speedup", "2", "--out", "none")
    done = cli("run", "user.py:network", *known, *options, cwd=folder)
    assert done.code in (1, 2)
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("user.py:network",), "give PRUNED"),
        (("user.py:network", "whole/model.onnx", "--learning-rate", "-1"), "positive"),
    ],
)
def test_finetune_says_what_is_missing(folder: Path, cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    done = cli("finetune", *arguments, "--data", "user.py:data", "--out", "no.onnx", cwd=folder)
    assert done.code == 2
    assert message in done.err

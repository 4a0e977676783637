"""What the README files say must be true: every command in them runs, on a tiny network and with times of a formula."""

import contextlib
import copy
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from onnx_spdy.models import export_module, find_layers, load_model, prepare, save_model
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER, PRUNERS
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH, SEARCHES
from onnx_spdy.pipeline.search.settings import SEARCH_SAMPLES
from onnx_spdy.pipeline.training.repair import NO_REPAIR, REPAIRS
from onnx_spdy.runtimes import RUNTIMES
from onnx_spdy.tools import cli, commands, operator_list
from onnx_spdy.tools.bench.__main__ import BENCHMARKS, command_line
from onnx_spdy.tools.bench.__main__ import main as bench_main
from onnx_spdy.tools.fuzz.__main__ import app as fuzz_app

ROOT = Path(__file__).resolve().parent.parent
FIRST = ["README.md", "tools/README.md", "tools/bench/README.md"]  # these leave what the others' commands start from
FOLDERS = ("models", "pipeline", "runtimes", "tools", "tests")
FOUND = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")}
PAGES = {name: (ROOT / name).read_text(encoding="utf8") for name in [*FIRST, *sorted(FOUND - set(FIRST))]}


@dataclass(frozen=True)
class Command:
    """A command that a page shows, as words of a shell."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"

    @property
    def program(self) -> str:
        """What is called: "onnx-spdy", "make", "pip", or a module."""
        return self.words[2] if self.words[:2] == ("python", "-m") else self.words[0]

    @property
    def arguments(self) -> list[str]:
        return [*self.words[3 if self.words[:2] == ("python", "-m") else 1 :]]

    @property
    def name(self) -> str:
        """The program's last name with the subcommand, where there is one."""
        return " ".join([self.program.rpartition(".")[2], *self.arguments[:1]])


def commands_in(page: str, text: str) -> list[Command]:
    """The indented lines that begin like a command, without their comments."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^ {4}((?:onnx-spdy|python -m onnx_spdy\S*|make|pip) .*)$", text, flags=re.MULTILINE)
    return [Command(page, tuple(shlex.split(line, comments=True))) for line in lines]


COMMANDS = [command for page, text in PAGES.items() for command in commands_in(page, text)]
APPS = {
    "onnx-spdy": typer.main.get_command(commands.app),
    "onnx_spdy.tools.bench": typer.main.get_command(command_line(*BENCHMARKS)),
    "onnx_spdy.tools.fuzz": typer.main.get_command(fuzz_app),
}
CALLS = [command for command in COMMANDS if command.program.startswith("onnx")]

# What the pages' words stand for. The test may not take minutes, and needs no engine: "fake", and fewer of everything.
STANDS_FOR = {
    "MODEL": "network.onnx",
    "DATA": "calibration.npz",
    "OTHER_DATA": "validation.npz",
    "PRUNED": "out/model/model.onnx",
    "FILE.onnx": "out/tuned.onnx",
    "DIR": "out/dir",
    "deepsparse": "fake",
    "sparse": "fake",
    "onnxruntime": "fake",
    "ssh://me@board:22/deepsparse": "fake",
    "ssh://board/deepsparse": "fake",
    "288,576,1152,2304": "16,32",
    "64,256,1024": "16,32",
    "2000": "3",
    "500": "2",
    "300": "1",
    "40": "1",
    "250": "2",
    "30": "1",
}
LESS = {
    "onnx-spdy run": ["--search-images", "300", "--allow-busy"],
    "onnx-spdy measure": ["--allow-busy"],
    "onnx-spdy search": ["--search-images", "300"],
    "onnx-spdy finetune": ["--epochs", "1"],
    "bench database": ["--layers", "0"],
    "bench cluster": ["--workers", "1", "--pruner", "magnitude"],
    "bench latency": ["--networks", "4"],
    "bench search": ["--search", "spdy,dp", "--speedup", "2", "--seed", "0"],
    "bench scaling": ["--layers", "3,6"],
    "bench solve": ["--speedup", "2", "--layers", "6"],
    "bench repair": ["--epochs", "1"],
    "bench gradual": ["--epochs", "1"],
}
# What a tiny network can't promise on a real clock: an encoder takes its time outside the layers, and has many of them;
# in int8 a run takes microseconds.
EASIER = {"minilm.py:network": ["--speedup", "1.005", "--pattern", "2:4"], "channels+int8": ["--speedup", "1.05"]}
NOT_RUN = {
    "onnx-spdy doctor": "it starts, and installs, every engine; tests/tools/test_cli.py runs it",
    "bench torch-pruning": "it needs the package torch-pruning",
    "bench gpu": "tests/tools/bench/test_gpu.py runs it without a GPU",
    "bench gpu-kernels": "it needs a GPU",
    "bench memory": "it takes minutes for each size; tests/tools/bench/test_memory.py runs it on a tiny one",
    "demo out/demo": "it trains a network for a minute: make demo",
}

LOG = """
[03/23/2026-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: conv1
[03/23/2026-00:14:05] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv1
[03/23/2026-00:14:15] [I] === Profile (100 iterations ) ===
[03/23/2026-00:14:15] [I]    Time(ms)     Avg.(ms)   Median(ms)   Time(%)   Layer
[03/23/2026-00:14:15] [I]        1.00       0.0100       0.0100     100.0   conv1
[03/23/2026-00:14:15] [I]        1.00       0.0100       0.0100     100.0   Total
"""
MINILM = """
from tests.encoder import encoder, sentences

def network():
    return encoder()

def data():
    return sentences(64)
"""


SMOLLM2 = f"""{MINILM}
import numpy as np

def held_out():
    return {{**sentences(16), "target": np.zeros(16)}}

def negative_perplexity(outputs, target):
    return -float(np.abs(next(iter(outputs.values()))).mean())
"""


def tiny_network() -> onnx.ModelProto:
    """Two convolutions and a classifier; at batch 16 most of the formula's time is in the second."""
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (16, 3, 3, 3), "b.weight": (64, 16, 3, 3), "c.weight": (10, 64), "c.bias": (10,)}
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"], "a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["ra"], "ra"),
        helper.make_node("Conv", ["ra", "b.weight"], ["b"], "b", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["b"], ["rb"], "rb"),
        helper.make_node("GlobalAveragePool", ["rb"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "c.weight", "c.bias"], ["output"], "c", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 12, 12])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(rng.normal(0, 0.2, shape).astype(np.float32), name) for name, shape in shapes.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def prepared(folder: Path) -> None:
    """The files that the pages' commands start from."""
    rng = np.random.default_rng(1)
    for name, count in (("calibration", 96), ("validation", 32)):
        images = rng.normal(size=(count, 3, 12, 12)).astype(np.float32).cumsum(axis=3)
        np.savez(folder / f"{name}.npz", input=images, target=rng.integers(0, 10, count))
    onnx.save(tiny_network(), folder / "network.onnx")
    for name in ("sparse.log", "dense.log"):
        (folder / name).write_text(LOG)
    (folder / "minilm.py").write_text(MINILM)
    (folder / "smollm2.py").write_text(SMOLLM2)
    (folder / "largest.py").write_text(snippet("largest.py"))
    (folder / "models" / "operators").mkdir(parents=True)
    shutil.copy(ROOT / "models/operators/README.md", folder / "models/operators/README.md")


def snippet(name: str) -> str:
    """The Python file of that name in a page: the indented lines after its comment."""
    (page,) = (text for text in PAGES.values() if f"    # {name}\n" in text)
    lines = page.split(f"    # {name}\n")[1].splitlines()
    end = next((n for n, line in enumerate(lines) if line and not line.startswith("    ")), len(lines))
    return textwrap.dedent("\n".join(lines[:end]))


def called(command: Command) -> tuple[int, str]:
    """Exit code and stderr of a command with its tiny stand-ins, in this folder."""
    arguments = [STANDS_FOR.get(word, word) for word in command.arguments] + LESS.get(command.name, [])
    for word in command.arguments:
        arguments += EASIER.get(word, [])
    if command.program == "onnx_spdy.tools.fuzz":  # it forks, and this process has threads
        done = subprocess.run([sys.executable, "-m", command.program, *arguments], capture_output=True, text=True)
        return done.returncode, done.stderr
    mains: dict[str, Callable[[list[str]], None]] = {
        "onnx-spdy": cli.main,
        "onnx_spdy.tools.bench": bench_main,
        "onnx_spdy.tools.operator_list": lambda given: operator_list.main(*map(Path, given)),
    }
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            mains[command.program](arguments)
        except SystemExit as exc:
            return int(exc.code or 0), errors.getvalue()
    return 0, errors.getvalue()


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """`contextlib.chdir`, which Python has from 3.11 on."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Command, tuple[int, str]]:
    """What became of each command; all in one folder, because they go on from each other's files."""
    folder, found, page = tmp_path_factory.mktemp("readme"), {}, ""
    prepared(folder)
    with inside(folder):
        for command in CALLS:
            if command.name in NOT_RUN:
                continue
            if command.page != page:  # a page may overwrite it
                page = command.page
                shutil.copy("network.onnx", "model.onnx")
            found[command] = called(command)
    return found


@pytest.mark.parametrize("command", [one for one in CALLS if one.name not in NOT_RUN], ids=str)
def test_every_command_runs(command: Command, outcomes: dict[Command, tuple[int, str]]) -> None:
    code, errors = outcomes[command]
    assert code == 0, errors


@pytest.mark.parametrize("command", [one for one in CALLS if one.program in APPS], ids=str)
def test_every_command_is_understood_as_it_stands(command: Command) -> None:
    app, arguments = APPS[command.program], command.arguments
    if "--help" in arguments:
        return
    if isinstance(app, typer.core.TyperGroup):
        app, arguments = app.commands[arguments[0]], arguments[1:]
    app.make_context(command.name, arguments)  # raises where an option isn't known, or a required one is missing


def test_every_command_is_shown() -> None:
    for program in APPS:
        shown = {one.arguments[0] for one in CALLS if one.program == program}
        assert set(APPS[program].commands) <= shown


def test_what_is_not_run_is_there() -> None:
    assert set(NOT_RUN) == {one.name for one in CALLS} & set(NOT_RUN)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    targets = [one.arguments[0] for one in COMMANDS if one.program == "make"]
    assert targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_what_pip_installs_exists() -> None:
    tomllib = pytest.importorskip("tomllib", reason="no tomllib before Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"onnx-spdy\[(\w+)\]", "".join(PAGES.values()))) <= set(extras)
    for command in (one for one in COMMANDS if one.program == "pip"):
        assert all((ROOT / word).exists() for word in command.arguments if word.endswith((".", ".txt")))


def test_paths_exist() -> None:
    for page, text in PAGES.items():
        for path in re.findall(r"`((?:models|runtimes|pipeline|tools|tests)/[\w./]*)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def row(option: str) -> str:
    return next(line for line in PAGES["tools/README.md"].splitlines() if line.startswith(f"| `{option}`"))


def test_the_tables_name_every_choice_and_default() -> None:
    assert all(f"`{name}`" in row("--runtime") for name in RUNTIMES)
    assert all(f"`{name}`" in row("--pruner") for name in PRUNERS)
    assert row("--pruner").endswith(f"`{DEFAULT_PRUNER}` |")
    assert all(f"`{name}`" in row("--search") for name in SEARCHES)
    assert row("--search").endswith(f"`{DEFAULT_SEARCH}` |")
    assert all(f"`{name}`" in row("--finetune") for name in REPAIRS)
    assert row("--finetune").endswith(f"`{NO_REPAIR}` |")
    assert row("--search-samples").endswith(f" {SEARCH_SAMPLES} |")


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", RUNTIMES),
        ("runtimes/README.md", RUNTIMES),
        ("pipeline/database/pruners/README.md", PRUNERS),
        ("pipeline/search/methods/README.md", SEARCHES),
    ],
)
def test_what_a_page_lists_is_all_there_is(page: str, names: dict[str, object]) -> None:
    assert [name for name in names if f"`{name}`" not in PAGES[page]] == []


def test_the_training_loop_that_is_shown_runs(tmp_path: Path) -> None:
    """The user's module, data, and the files of a run are what the text says; the rest is the page's own code."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 10))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(12)]
    teacher = copy.deepcopy(module).eval()
    dense = prepare(export_module(module, batches[0])).proto
    save_model(dense, tmp_path / "dense.onnx")
    level = Level("unstructured", 0.75)
    levels = {layer.name: level for layer in find_layers(dense) if layer.prunable}
    profile = Profile(levels, 2.0, 2.0, 1.0, 2.0, 0.0, "kl", None, "uniform", 0, 0, "finished", 0, None, {})
    profile.save(tmp_path / "profile.json")
    names = {"module": module, "teacher": teacher, "batches": batches, "folder": tmp_path}
    exec(compile(snippet("gradual.py"), "gradual.py", "exec"), names)
    written = load_model(tmp_path / "trained.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    sparse = [arrays[layer.weight] for layer in find_layers(written) if layer.prunable]
    assert len(sparse) == 2
    assert all((weight == 0).mean() == pytest.approx(0.75, abs=1e-3) for weight in sparse)


@pytest.mark.parametrize("file", ["minilm.py", "smollm2.py"])
def test_language_models_have_the_functions_that_their_commands_name(file: str) -> None:
    """They aren't run: they need transformers and weights. Their commands are, with other files of that name."""
    names = compile(snippet(file), file, "exec").co_names
    asked = {word.partition(":")[2] for one in CALLS for word in one.words if word.startswith(f"{file}:")}
    assert {"network", "data"} <= asked <= set(names)


def test_the_list_of_operators_is_the_codes() -> None:
    page = "models/operators/README.md"
    assert operator_list.operator_list() in PAGES[page], f"renew it: python -m onnx_spdy.tools.operator_list {page}"

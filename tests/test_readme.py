"""What the README says must be true."""

import copy
import re
import textwrap
from pathlib import Path

import onnx
import pytest
import torch
import typer
from torch import nn

from onnx_spdy.models import export_module, find_layers, load_model, prepare, save_model
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER, PRUNERS
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.run import SEARCH_SAMPLES
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH, SEARCHES
from onnx_spdy.pipeline.training.repair import NO_REPAIR, REPAIRS
from onnx_spdy.runtimes import RUNTIMES
from onnx_spdy.tools.cli import app
from onnx_spdy.tools.operator_list import operator_list

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
COMMAND = typer.main.get_command(app)
CALLS = re.findall(r"^    onnx-spdy (\w+)((?:.*\\\n)*.*)$", README, flags=re.MULTILINE)


def test_every_command_is_in_the_readme() -> None:
    assert {name for name, _ in CALLS} == set(COMMAND.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "rest"), CALLS, ids=lambda value: value.split("\n")[0].strip()[:40])
def test_every_option_that_is_shown_exists(name: str, rest: str) -> None:
    known = {option for parameter in COMMAND.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
    shown = set(re.findall(r"--[a-z-]+", rest.split("#")[0]))
    assert shown <= known
    required = {
        parameter.opts[0]
        for parameter in COMMAND.commands[name].params  # type: ignore[attr-defined]
        if parameter.required and parameter.opts[0].startswith("--")
    }
    assert required <= shown


def row(option: str) -> str:
    return next(line for line in README.splitlines() if line.startswith(f"| `{option}`"))


def test_the_tables_name_every_choice_and_default() -> None:
    assert all(f"`{name}`" in row("--runtime") for name in RUNTIMES)
    assert all(f"`{name}`" in row("--pruner") for name in PRUNERS)
    assert row("--pruner").endswith(f"`{DEFAULT_PRUNER}` |")
    assert all(f"`{name}`" in row("--search") for name in SEARCHES)
    assert row("--search").endswith(f"`{DEFAULT_SEARCH}` |")
    assert all(f"`{name}`" in row("--finetune") for name in REPAIRS)
    assert row("--finetune").endswith(f"`{NO_REPAIR}` |")
    assert row("--search-samples").endswith(f" {SEARCH_SAMPLES} |")


def test_the_training_loop_that_is_shown_runs(tmp_path: Path) -> None:
    """The user's module, data, and the files of a run are what the text says; the rest is the README's own code."""
    lines = README.split("    # gradual.py\n")[1].split("\n\nWhich parameter")[0]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 10))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(12)]
    teacher = copy.deepcopy(module).eval()
    dense = prepare(export_module(module, batches[0]))
    save_model(dense, tmp_path / "dense.onnx")
    level = Level("unstructured", 0.75)
    levels = {layer.name: level for layer in find_layers(dense) if layer.prunable}
    profile = Profile(levels, 2.0, 2.0, 1.0, 2.0, 0.0, "kl", None, "uniform", 0, 0, "finished", 0, None, {})
    profile.save(tmp_path / "profile.json")
    names = {"module": module, "teacher": teacher, "batches": batches, "folder": tmp_path}
    exec(compile(textwrap.dedent(lines), "README", "exec"), names)
    written = load_model(tmp_path / "trained.onnx")
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    sparse = [arrays[layer.weight] for layer in find_layers(written) if layer.prunable]
    assert len(sparse) == 2
    assert all((weight == 0).mean() == pytest.approx(0.75, abs=1e-3) for weight in sparse)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_paths_exist() -> None:
    for path in re.findall(r"`((?:models|runtimes|pipeline|tools)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_list_of_operators_is_the_codes() -> None:
    assert operator_list() in README, "renew it: python -m onnx_spdy.tools.operator_list README.md"

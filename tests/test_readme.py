"""What the README says must be true."""

import re
from pathlib import Path

import pytest
import typer

from onnx_spdy.pipeline.pruners import DEFAULT_PRUNER, PRUNERS
from onnx_spdy.pipeline.run import SEARCH_SAMPLES
from onnx_spdy.pipeline.searches import DEFAULT_SEARCH, SEARCHES
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
    assert row("--search-samples").endswith(f" {SEARCH_SAMPLES} |")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_paths_exist() -> None:
    for path in re.findall(r"`((?:models|runtimes|pipeline|tools)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_list_of_operators_is_the_codes() -> None:
    assert operator_list() in README, "renew it: python -m onnx_spdy.tools.operator_list README.md"

"""The one command of all benchmarks, and the files that they leave."""

import subprocess
import sys
from pathlib import Path

import pytest

from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.runtimes import cpu_model, instruction_set
from onnx_spdy.tools.bench.__main__ import BENCHMARKS, main
from onnx_spdy.tools.results import read_results

SOLVE = ["solve", "--layers", "3", "--levels", "4", "--seed", "5"]


def code_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_the_list_of_benchmarks_is_quick_because_it_imports_none() -> None:
    code = """
import contextlib, sys
from onnx_spdy.tools.bench.__main__ import main
with contextlib.suppress(SystemExit):
    main(["--help"])
print({"torch", "onnxruntime", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in BENCHMARKS)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_has_help_and_writes_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([name, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_a_file_says_where_its_figures_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([*SOLVE, "--json", str(tmp_path / "found.json")]) == 0
    found = read_results(tmp_path / "found.json", "bench_solve")
    made = found["environment"]
    assert (made["cpu"], made["instruction_set"], made["seed"]) == (cpu_model(), instruction_set(), 5)
    assert all(made["versions"][name] for name in ("onnx-spdy", "torch", "onnxruntime"))
    (row,) = found["rows"]
    assert row["left"] >= 0 and 0 <= row["above_least"] <= row["above_most"]
    assert "3 layers x 4 levels" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="bench_search"):
        read_results(tmp_path / "found.json", "bench_search")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing"),
        (["scaling", "--layers", "3,many"], "'many' is not a number"),
        ([*SOLVE, "--latency", "latency.json"], "belong together"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["solve", "--latency", "missing.json", "--database", "missing"]) == 1
    assert capsys.readouterr().err.startswith("error: missing.json")

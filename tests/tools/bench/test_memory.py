"""The benchmark of memory, and the decoders that it makes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer

from onnx_spdy.models import find_layers, load_model
from onnx_spdy.tools.bench.decoder import SIZES, random_tokens, write_decoder
from onnx_spdy.tools.bench.memory import StepFailed, bench, growth, watched
from onnx_spdy.tools.results import read_results

MIB = 1 << 20


def test_a_decoder_is_a_valid_model_of_the_size_that_it_says(tmp_path: Path) -> None:
    size = SIZES["tiny"]
    write_decoder(size, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    model = load_model(tmp_path / "model.onnx")
    matrices = [t for t in model.graph.initializer if len(t.dims) == 2]
    assert sum(np.prod(t.dims) for t in matrices) == size.weights
    assert len([layer for layer in find_layers(model) if layer.prunable]) == 6 * size.layers + 1
    assert random_tokens(size, 3).shape == (3, size.sequence) and random_tokens(size, 3).max() < size.vocabulary


def test_the_largest_decoder_has_the_weights_that_its_name_says() -> None:
    assert {name: round(size.weights / 1e6) for name, size in SIZES.items() if name != "tiny"} == {
        "125m": 134, "350m": 368, "1.3b": 1339,
    }  # fmt: skip


def test_memory_of_a_command_is_that_of_its_processes() -> None:
    code = "import subprocess, sys, time; x = b'1' * (100 << 20); {}; time.sleep(0.5)"
    child = f"subprocess.run([sys.executable, '-c', {code.format('pass')!r}])"
    seconds, resident, anonymous = watched([sys.executable, "-c", code.format(child)])
    assert seconds > 0.5 and 200 * MIB < anonymous < resident < 400 * MIB
    with pytest.raises(StepFailed, match="No module named nothing"):
        watched([sys.executable, "-m", "nothing"])


def test_growth_is_the_exponent() -> None:
    assert growth([1, 10, 100], [3.0, 30.0, 300.0]) == pytest.approx(1)
    assert growth([2, 4], [5.0, 20.0]) == pytest.approx(2)


@pytest.mark.slow
def test_every_step_of_a_tiny_decoder_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench("tiny", "inspect,prepare,database,deploy", "magnitude", 4, tmp_path / "out", 0, tmp_path / "rows.json")
    rows = read_results(tmp_path / "rows.json", "bench_memory")["rows"]
    assert [row["step"] for row in rows] == ["inspect", "prepare", "database", "deploy"]
    assert all(0 < row["anonymous_bytes"] < row["resident_bytes"] and row["seconds"] > 0 for row in rows)
    assert load_model(tmp_path / "out" / "tiny" / "pruned.onnx").graph.node
    assert "Memory and time" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="nothing"):
        bench("nothing")

"""trtexec's own output, in the documented format with made-up times, as one table."""

import json
from pathlib import Path

import pytest

from onnx_spdy.tools.bench import read_trtexec
from onnx_spdy.tools.bench.__main__ import main
from onnx_spdy.tools.results import read_results

LOG = """
[03/23/2026-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: conv1 + relu1, conv2, conv3, lost
[03/23/2026-00:14:05] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2, conv3
[03/23/2026-00:14:15] [I] === Profile (100 iterations ) ===
[03/23/2026-00:14:15] [I]    Time(ms)     Avg.(ms)   Median(ms)   Time(%)   Layer
[03/23/2026-00:14:15] [I]        1.00       0.0100       0.0100      10.0   conv1 + relu1
[03/23/2026-00:14:15] [I]        2.00       0.0200       0.0200      20.0   conv2
[03/23/2026-00:14:15] [I]        3.00       0.0300       0.0300      30.0   conv3
[03/23/2026-00:14:15] [I]        4.00       0.0400       0.0400      40.0   softmax
[03/23/2026-00:14:15] [I]       10.00       0.1000       0.1000     100.0   Total
"""
DENSE = {"conv1 + relu1": 0.01, "conv2": 0.035, "conv3": 0.025, "softmax": 0.04}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    entries = [{"name": name, "timeMs": 100 * ms, "averageMs": ms, "medianMs": ms} for name, ms in DENSE.items()]
    path = tmp_path / "dense.json"
    path.write_text(json.dumps([{"count": 100}, *entries]))
    return path


def test_each_layer_says_whether_it_was_picked_and_what_that_brought(tmp_path: Path, dense: Path) -> None:
    log = tmp_path / "sparse.log"
    log.write_text(LOG)
    found = read_trtexec.layer_sparsities(LOG, read_trtexec.read_profile(log), read_trtexec.read_profile(dense))
    assert {one.name: one.why_not for one in found} == {
        "conv1 + relu1": "not picked", "conv2": "", "conv3": "slower", "softmax": "not eligible", "lost": "not picked"
    }  # fmt: skip
    second = found[1]
    assert (second.dense_seconds, second.sparse_seconds) == (pytest.approx(35e-6), pytest.approx(20e-6))
    assert (found[-1].dense_seconds, found[-1].sparse_seconds) == (None, None)


def test_the_table_is_printed_and_a_log_without_one_is_an_error(
    tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, command = tmp_path / "sparse.log", ["read-trtexec", str(tmp_path / "sparse.log"), "--dense", str(dense)]
    log.write_text(LOG)
    with pytest.raises(SystemExit):
        main([*command, "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "2 of 4 eligible layers were picked" in printed
    assert any(("conv2" in line and "0.0350" in line and "0.0200" in line) for line in printed.splitlines())
    assert [one["picked"] for one in read_results(tmp_path / "found.json", "bench_read_trtexec")["layers"]] == [
        False, True, True, False, False
    ]  # fmt: skip
    log.write_text("Engine built")
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 1
    assert "dumpProfile" in capsys.readouterr().err

"""The benchmark of groups, on a network whose work can be counted by hand."""

from pathlib import Path

import pytest

from onnx_spdy.models import save_model
from onnx_spdy.models.work import multiply_accumulates
from onnx_spdy.tools.bench.groups import bench
from onnx_spdy.tools.results import read_results
from tests.models.narrowing import network

CHAIN = """
g (float[2, 3, 8, 8] x) => (float[2, 5, 8, 8] y) <float[8, 3, 1, 1] w1, float[5, 8, 3, 3] w2>
{
    [first] a = Conv (x, w1)
    r = Relu (a)
    [second] y = Conv <pads = [1, 1, 1, 1]> (r, w2)
}"""


def test_the_table_says_how_much_work_can_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(network(CHAIN), tmp_path / "chain.onnx")
    bench([str(tmp_path / "chain.onnx")], tmp_path / "rows.json")
    inner, everything = read_results(tmp_path / "rows.json", "bench_groups")["rows"]
    assert (inner["kind"], inner["groups"], inner["units"], inner["fixed"]) == ("inner", 1, 8, 1)
    assert inner["reasons"] == ["output 'y' of the graph keeps its shape"]
    assert inner["removable"] == everything["removable"] == pytest.approx(7 / 8)
    assert "chain" in capsys.readouterr().out


def test_work_is_counted_as_by_hand() -> None:
    pixels = 2 * 8 * 8
    assert multiply_accumulates(network(CHAIN)) == {"first": pixels * 3 * 8, "second": pixels * 8 * 9 * 5}
    model = network("""
    g (float[2, 4, 6] x, float[2, 6, 5] z) => (float[2, 4, 5] y, float[7, 8] g)
    <float[9, 7] a, float[9, 8] b>
    {
        [product] y = MatMul (x, z)
        [gemm] g = Gemm <transA = 1> (a, b)
    }""")
    assert multiply_accumulates(model) == {"product": 2 * 4 * 6 * 5, "gemm": 7 * 9 * 8}
    model = network("""
    g (float[2, 4, 3, 3] x) => (float[2, 5, 6, 6] y) <float[4, 5, 2, 2] w>
    { [up] y = ConvTranspose <strides = [2, 2]> (x, w) }""")
    assert multiply_accumulates(model) == {"up": 2 * 4 * 9 * 5 * 4}

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from onnx_spdy.tools import show
from onnx_spdy.tools.report.front import render, write_front_html


def point(target: float, loss: float, missed: str | None = None) -> dict[str, Any]:
    return {
        "folder": f"{target:g}x", "target_speedup": target, "predicted_speedup": target * 1.02,
        "measured_speedup": target * 1.01, "measured_speedup_lower": target, "measured_speedup_upper": target * 1.02,
        "pruned_seconds": 0.01 / target, "loss": loss, "held_out_loss": 1.1 * loss, "metric_pruned": 0.9 - loss,
        "sparsity": 0.8, "missed": missed, "asked_speedup": target, "beats_best_dense": target > 2,
        "best_pruned": {"runtime": "deepsparse", "precision": "fp32", "seconds": 0.01 / target, "metric": 0.9 - loss},
        "best_dense_alternative": {"runtime": "openvino", "precision": "int8", "seconds": 0.004, "metric": 0.9},
        "times_as_fast_as_best_dense": 0.4 * target,
    }  # fmt: skip


@pytest.fixture
def front() -> dict[str, Any]:
    environment = {
        "runtime": "deepsparse", "version": "1.8.0", "precision": "fp32", "batch": 16, "threads": 2, "cores": 2,
        "cpu": "A & B <cpu>", "instruction_set": "avx512", "host": "here", "options": {},
    }  # fmt: skip
    return {
        "headline": "1 of 3 networks are faster", "runtime": "deepsparse", "environment": environment,
        "loss_name": "kl", "metric_name": "top1",
        "metric_dense": 0.91, "dense_seconds": 0.01, "highest_speedup": 4.6,
        "points": [point(1.5, 0.001), point(2.0, 0.01), point(3.0, 0.1, "3x was not reached")],
    }  # fmt: skip


def test_page_and_plot_show_every_point(front: dict[str, Any], tmp_path: Path) -> None:
    write_front_html(front, tmp_path)
    page = (tmp_path / "front.html").read_text()
    for text in (
        "1 of 3 networks are faster.",
        "<strong>1.20x in deepsparse fp32</strong>",
        "openvino int8",
        "1.515x",
        "2.020x",
        "3.030x",
        'href="2x/report.html"',
        "3x was not reached",
        "A &amp; B &lt;cpu&gt;",
    ):
        assert text in page
    plot = ElementTree.parse(tmp_path / "front.svg").getroot()
    assert plot.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join(plot.itertext())
    assert "measured speedup" in words
    assert "kl loss" in words
    assert "top1" in words
    assert "var(" not in (tmp_path / "front.svg").read_text()


def test_without_metric_or_held_out_samples_there_is_still_a_page(front: dict[str, Any]) -> None:
    front |= {"metric_dense": None, "metric_name": None}
    for one in front["points"]:
        one |= {"metric_pruned": None, "held_out_loss": None}
    assert "top1" not in render(front)


def test_the_same_front_gives_the_same_page(front: dict[str, Any]) -> None:
    assert render(front) == render(front)


def test_the_command_line_shows_every_point(
    front: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show.front(front, tmp_path)
    printed = capsys.readouterr().out
    for text in ("1 of 3 networks are faster", "1.20x *", "1.5x", "2x", "3x", "0.01", "front.svg", "batch 16"):
        assert text in printed

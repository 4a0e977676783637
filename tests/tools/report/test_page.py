"""The page: what it says, what it never contains, and that any network fits on it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.artifact import CHECKSUM
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.metric import Evaluation, top1
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.runtimes import Measurement, open_runtime, ratio_confidence
from onnx_spdy.tools.report import page as page_module
from onnx_spdy.tools.report.page import render, write_report_html
from tests.pipeline.conftest import build_model

ENVIRONMENT = {
    "runtime": "deepsparse", "version": "1.8.0", "precision": "fp32", "cpu": "AMD EPYC 9R14", "host": "bench-3",
    "instruction_set": "avx512_vnni", "cores": 8, "threads": 8, "batch": 16, "options": {"NM_ARCH": "avx512"},
}  # fmt: skip


def realistic(layers: int = 20, target: float = 2.0, measured: float = 2.02) -> dict[str, Any]:
    """A report like that of a small residual network in DeepSparse."""
    rng = np.random.default_rng(1)
    rows = [_layer(index, layers, rng) for index in range(layers)]
    scale = (0.0561 - 6.4e-3) / sum(row["dense_seconds"] for row in rows)
    for row in rows:
        row |= {"dense_seconds": row["dense_seconds"] * scale, "seconds": row["seconds"] * scale}
    rest = [
        {"kernel": "elementwise_add_relu", "outputs": f"/layer{index // 2 + 1}/{index % 2}/relu_1/Relu_output_0",
         "seconds": 1e-4 * (9 - index)} for index in range(8)
    ] + [{"kernel": "batch_copy", "outputs": "", "seconds": 4e-4}]  # fmt: skip
    drift = np.exp(0.01 * np.cumsum(rng.standard_normal(25)))
    dense = 0.0561 * drift * np.exp(0.008 * rng.standard_normal(25))
    pruned = 0.0561 / measured * drift * np.exp(0.008 * rng.standard_normal(25))
    one, other = Measurement(tuple(dense), (0.07, 0.06)), Measurement(tuple(pruned), (0.04, 0.03))
    speedup, lower, upper = ratio_confidence(one, other)
    return {
        "format": "onnx_spdy.report", "version": 1, "runtime": "deepsparse",
        "target_speedup": target, "highest_speedup": 3.4, "foreign_cores": 0.01, "table_foreign_cores": 0.02,
        "prediction": {"networks": 8, "median": 0.012, "largest": 0.034},
        "alternatives": {
            "measured": [
                {"name": "deepsparse fp32", "role": "pruned", "median_seconds": 0.0278, "fallback": None,
                 "metric": 0.9043},
                {"name": "deepsparse fp32", "role": "dense", "median_seconds": 0.0561, "fallback": None,
                 "metric": 0.9125},
                {"name": "openvino bf16", "role": "dense", "median_seconds": 0.0139, "fallback": "half of it",
                 "metric": 0.9111},
            ],
            "missing": {"onnxruntime": "it is not installed"},
            "verdict": "The dense network in openvino bf16 is 2.00x as fast as the pruned one.",
        },
        "headline": "2.02x as fast as the dense network in deepsparse fp32; openvino bf16 is 2.00x as fast as this",
        "against": None,
        "best_pruned": {"runtime": "deepsparse", "precision": "fp32", "seconds": 0.0278, "metric": 0.9043},
        "best_dense_alternative": {"runtime": "openvino", "precision": "bf16", "seconds": 0.0139, "metric": 0.9111},
        "times_as_fast_as_best_dense": 0.5, "times_as_fast_as_best_dense_lower": 0.49,
        "times_as_fast_as_best_dense_upper": 0.51,
        "predicted_speedup": 0.0561 / (6.4e-3 + sum(row["seconds"] for row in rows)),
        "measured_speedup": speedup, "measured_speedup_lower": lower, "measured_speedup_upper": upper,
        "visits": [speedup] * 6,
        "dense_seconds": one.median, "pruned_seconds": other.median, "dense": one.to_json(), "pruned": other.to_json(),
        "environment": ENVIRONMENT, "fallback": None,
        "metric_name": "top1", "metric_dense": 0.9125, "metric_pruned": 0.9043,
        "loss_name": "kl", "loss": 0.01834, "held_out_loss": 0.02, "search": "spdy",
        "search_ended": "finished", "evaluations": 1100, "images": 140800, "seed": 0, "sparsity": 0.8714,
        "repair": None, "finetune": None, "int8": None, "missed": None,
        "attempts": [
            {"aim_speedup": 2.0, "predicted_speedup": 2.01, "loss": 0.01, "measured_speedup": measured,
             "measured_speedup_lower": measured - 0.02}
        ],
        "statistics_correction": "mean and variance of each pruned layer's output channels",
        "made_from": {"model_sha256": "3f" * 32, "data_sha256": "a1" * 32, "pruner": "obs", "search_samples": "128"},
        "stages": [{"name": "measure", "seconds": 41.2}, {"name": "database", "seconds": 812.0},
                   {"name": "search", "seconds": 300.5}, {"name": "validate", "seconds": 9.0}],
        "layers": rows, "rest": rest, "rest_seconds": sum(row["seconds"] for row in rest),
        "skipped": [{"name": "/conv1/Conv", "op": "Conv", "reason": "only 147 weights; sparse kernels gain nothing"}],
    }  # fmt: skip


def _layer(index: int, layers: int, rng: np.random.Generator) -> dict[str, Any]:
    sparsity = 0.0 if index % 7 == 3 else float(np.round(0.7 + 0.27 * rng.random(), 4))
    dense = float(np.exp(rng.normal(0, 0.5))) * 0.05 / layers
    width = 64 * 2 ** (4 * index // layers)
    return {
        "name": f"/layer{4 * index // layers + 1}/layer{4 * index // layers + 1}.{index}/conv{index % 2 + 1}/Conv",
        "op": "Conv", "initializer": f"w{index}", "shape": [width, width, 3, 3],
        "level": f"unstructured@{sparsity:.4f}" if sparsity else "dense", "sparsity": sparsity,
        "break_even": "unstructured@0.4000" if sparsity else None,
        "dense_seconds": dense, "seconds": dense * min(1.0, (1 - sparsity) / 0.6 + 0.05) if sparsity else dense,
        "dense_kernel": "conv_winograd", "kernel": "conv_sparse_im2col" if sparsity else "conv_winograd",
        "error": 0.02 * sparsity**4, "note": "" if sparsity else "left dense; at best 2.1x faster",
    }  # fmt: skip


class _Page(HTMLParser):
    """Tags that are open at the end, all ids, and the text outside of <style>."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        pieces: list[str] = []
        self.handle_data = lambda data: pieces.append(data) if "style" not in self.open else None  # type: ignore[method-assign]
        self.feed(page)
        self.close()
        self.text = " ".join(" ".join(pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_made_by_hand_here_has_the_keys_of_a_real_one(tmp_path: Path) -> None:
    """Everything but `alternatives`, which is there only where it was asked for."""
    rng = np.random.default_rng(1)
    samples = Samples({"input": rng.normal(size=(32, 3, 12, 12)).astype(np.float32)}, rng.integers(0, 10, 32))
    with open_runtime("fake", layer_overhead_seconds=0.0, node_seconds=1e-9) as runtime:
        run(
            Prepared(build_model()), samples, runtime, workload_of(samples, 8), Target(1.2, tmp_path),
            compression=Compression(pruner=pruner_named("magnitude")), search=SearchSettings("uniform"),
            evaluation=Evaluation(samples, top1, "top1"),
        )  # fmt: skip
    real = json.loads((tmp_path / "report.json").read_text())
    made = realistic()
    assert set(made) - {"alternatives"} == set(real) - {"alternatives", CHECKSUM}
    for part in ("layers", "rest", "stages", "attempts"):
        assert set(made[part][0]) == set(real[part][0]), part
    assert set(made["environment"]) <= set(real["environment"])
    assert _Page(render(real)).open == []


@pytest.fixture(scope="module")
def page() -> str:
    return render(realistic())


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The text of the page for a report with other values; without plots, which take most of the time."""
    monkeypatch.setattr(page_module, "svg_plot", lambda draw, **kwargs: "")
    return lambda layers=1, **values: _Page(render(realistic(layers) | values)).text


def test_every_layer_has_its_row_and_the_page_is_well_formed(page: str) -> None:
    parsed = _Page(page)
    for layer in realistic()["layers"]:
        assert f'<span class="name">{layer["name"]}</span>' in page
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.tags.count("svg") == 2
    assert parsed.tags.count("table") == parsed.tags.count("caption")


def test_the_headline_has_the_numbers_of_the_report(page: str) -> None:
    text = _Page(page).text
    report = realistic()
    assert f"{report['dense_seconds'] * 1e3:.2f} → {report['pruned_seconds'] * 1e3:.2f} ms" in text
    assert "0.9125 → 0.9043 -0.82 points" in text
    assert "deepsparse 1.8.0, fp32, batch 16, 8 of 8 cores, AMD EPYC 9R14 (avx512_vnni)" in text


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ((2.0, 2.01, 2.03), "Target met"),
        ((1.9996, 2.01, 2.03), "Not certain: the measured value reaches the target of 2x, but its lower bound"),
        ((1.9, 1.9996, 2.03), "Target missed: the measured value is below the target of 2x"),
        ((1.5, 1.6, 1.7), "Target missed: even the upper bound of 1.700x is below the target of 2x"),
    ],
)
def test_it_says_honestly_whether_the_target_was_met(
    words: Callable[..., str], bounds: tuple[float, float, float], verdict: str
) -> None:
    keys = ("measured_speedup_lower", "measured_speedup", "measured_speedup_upper")
    text = words(**dict(zip(keys, bounds, strict=True)))
    assert verdict in text
    assert [kind for kind in ("Target met", "Not certain", "Target missed") if kind in text] == [verdict.split(":")[0]]


def test_hostile_names_are_only_text() -> None:
    hostile = "<script>alert('x')</script>-->$\\frac{$\n\"'&amp; 层"
    report = realistic(layers=3)
    for row in (*report["layers"], *report["skipped"]):
        row.update({key: hostile for key in ("name", "op", "level", "kernel", "note", "reason") if key in row})
    report["rest"][0].update(kernel=hostile, outputs=hostile)
    report |= {"fallback": hostile, "metric_name": hostile, "made_from": {hostile: hostile}, "search": hostile}
    report["environment"] = ENVIRONMENT | {"cpu": hostile, "options": {hostile: hostile}}
    parsed = _Page(render(report))
    assert "script" not in parsed.tags
    assert parsed.open == []
    assert " ".join(hostile.split()) in parsed.text


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert "://" not in page
    assert "@import" not in page and "url(http" not in page
    assert not {"script", "link", "img", "iframe", "object"} & set(_Page(page).tags)
    assert all(address.startswith("#") for address in _Page(page).addresses)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_references_inside_the_plots_lead_somewhere(page: str) -> None:
    parsed = _Page(page)
    used = {address[1:] for address in parsed.addresses} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert used and used <= set(parsed.ids)


def test_the_same_report_gives_the_same_page_and_is_not_changed(page: str) -> None:
    report = realistic()
    before = copy.deepcopy(report)
    assert render(report) == page
    assert report == before


def test_without_a_metric_it_says_that_none_was_evaluated(words: Callable[..., str]) -> None:
    text = words(metric_name=None, metric_dense=None, metric_pruned=None)
    assert "not evaluated" in text and "points" not in text


def test_a_metric_that_is_no_fraction_has_a_plain_difference(words: Callable[..., str]) -> None:
    text = words(metric_dense=30.5, metric_pruned=31.25)
    assert "30.5 → 31.25 +0.75" in text and "+0.75 points" not in text


def test_times_of_the_formula_are_not_called_measurements(words: Callable[..., str]) -> None:
    formula = ENVIRONMENT | {"runtime": "fake", "precision": "formula", "cpu": "formula"}
    assert "These are no measurements." in words(runtime="fake", environment=formula)
    assert "These are no measurements." not in words()


def test_a_fallback_is_a_notice(words: Callable[..., str]) -> None:
    assert "not optimised by the engine: Resize runs in ONNX Runtime" in words(fallback="Resize runs in ONNX Runtime")
    assert "not optimised by the engine" not in words()


def test_parts_of_the_remaining_time_add_up_to_the_table(words: Callable[..., str]) -> None:
    report = realistic()
    text = words(layers=20)
    total = report["rest_seconds"] + sum(layer["seconds"] for layer in report["layers"])
    assert f"the pruned network takes {total * 1e3:.2f} ms" in text
    shares = re.findall(r"([\d.]+) %", text[text.index("Slowest parts") : text.index("Times by the latency table")])
    assert sum(map(float, shares)) == pytest.approx(100, abs=1)


def test_200_layers_stay_readable_and_small() -> None:
    report = realistic(layers=200)
    page = render(report)
    plot = page[page.index("<svg") : page.index("</svg>")]
    assert plot.count("<text") < 60
    assert len(page) < 500_000
    assert all(f">{layer['name']}<" in page for layer in report["layers"])


def test_degenerate_times_are_shown() -> None:
    report = realistic(layers=1) | {"rest": [], "rest_seconds": 0.0, "stages": [], "skipped": []}
    report["layers"][0] |= {"dense_seconds": 0.0, "seconds": 0.0}
    flat = {"seconds": [0.001] * 25, "warmup_seconds": []}
    assert "0.0000 -" in _Page(render(report | {"dense": flat, "pruned": flat})).text


def test_the_file_holds_the_page(tmp_path: Path, page: str) -> None:
    path = tmp_path / "new" / "report.html"
    write_report_html(realistic(), path)
    assert path.read_text(encoding="utf8") == page
    assert [*path.parent.iterdir()] == [path]


def test_rounding_never_lifts_a_speedup_to_its_target(words: Callable[..., str]) -> None:
    text = words(measured_speedup=1.9996, measured_speedup_lower=1.9991)
    assert "1.999x as fast" in text and "95 % bounds 1.999x to" in text


def test_dense_alternatives_are_set_beside_the_pruned_network() -> None:
    page = render(realistic())
    assert "The dense network in openvino bf16 is 2.00x as fast as the pruned one." in page
    start = page.index("The dense network elsewhere")
    section = page[start : page.index("Where the remaining time is")]
    assert section.index("openvino bf16") < section.index("deepsparse fp32")  # the fastest first
    assert "2.00x" in section[section.index("<tbody>") :]
    assert "half of it" in section
    assert "not measured: it is not installed" in section
